package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
)

// Remote is the Unix socket of another program.
type Remote struct {
	// What names it in errors, such as "system bus".
	What, Path string
	// Missing, Denied and Refused are the remedies if the file is missing, if it may not
	// be used, and if nobody listens.
	Missing, Denied, Refused string
}

// Dial connects to the socket. Its errors name the socket and the remedy.
func (r Remote) Dial(ctx context.Context) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", r.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s %s does not exist: %s", r.What, r.Path, r.Missing)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s %s: permission denied: %s", r.What, r.Path, r.Denied)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%s %s: nobody listens: %s", r.What, r.Path, r.Refused)
	case err != nil:
		return nil, fmt.Errorf("%s %s: %w", r.What, r.Path, err)
	}
	return conn, nil
}
