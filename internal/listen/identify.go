package listen

import (
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"
)

// identifying are credentials that identify the caller of a connection after the
// handshake. Only then has the client shown that it has its certificate's key.
type identifying struct {
	credentials.TransportCredentials
	s *server
}

// ServerHandshake implements credentials.TransportCredentials.
func (i *identifying) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	done, info, err := i.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	c, ok := raw.(*conn)
	if !ok {
		return done, info, nil
	}
	caller := i.s.Identify(info)
	if err := c.owner.identify(c, caller); err != nil {
		c.owner.refused(c.from, err)
		_ = done.Close()
		return nil, nil, fmt.Errorf("connection refused: %w", err)
	}
	if caller == "" && c.from.IsValid() {
		c.bounded, c.left = true, maxAnonymousBytes
	}
	return done, info, nil
}

// Clone implements credentials.TransportCredentials.
func (i *identifying) Clone() credentials.TransportCredentials {
	return &identifying{i.TransportCredentials.Clone(), i.s}
}
