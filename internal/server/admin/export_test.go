package admin

import (
	"net"
)

// Roles is the table of what each method takes.
var Roles = roles

// Identify is whether the kernel says who is at the other end.
func Identify(c net.Conn) error {
	_, err := identify(c)
	return err
}

// ManagesAs is whether a process of a user, in no group, is a manager.
func ManagesAs(r Rules, uid uint32) bool { return r.ofProcess(process{uid: uid}) == Manager }
