package operator

import (
	"net"

	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/api"
)

// Roles is the table of what each method takes.
var Roles = roles

// ClientOptions are those of a Client's connection.
var ClientOptions = options

// ClientOf makes a Client of a connection.
func ClientOf(conn *grpc.ClientConn) *Client {
	return &Client{OperatorClient: api.NewOperatorClient(conn), conn: conn}
}

// Identify is whether the kernel says who is at the other end.
func Identify(c net.Conn) error {
	_, err := identify(c)
	return err
}

// ManagesAs is whether a process of a user, in no group, is a manager.
func ManagesAs(r Rules, uid uint32) bool { return r.ofProcess(process{uid: uid}) == Manager }
