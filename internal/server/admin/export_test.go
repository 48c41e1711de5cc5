package admin

import (
	"net"
)

// Roles has the role that each method needs.
var Roles = roles

// Identify returns an error if the kernel does not identify the peer.
func Identify(c net.Conn) error {
	_, err := identify(c)
	return err
}

// ManagesAs reports whether a process of a user, in no group, is a manager.
func ManagesAs(r Rules, uid uint32) bool { return r.processRole(process{uid: uid}) == Manager }
