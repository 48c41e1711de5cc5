package docker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/socket"
)

// maxAnswer is the size of an engine's answer in bytes, with its header. Labels and variables make most of
// it, and a program can be started with 2 MiB of variables: execve(2).
const maxAnswer = 4 << 20

// engine is a container engine that speaks the Docker Engine API at a Unix socket. It is
// safe for concurrent use.
type engine struct {
	path string
	dial func(ctx context.Context) (net.Conn, error)

	mu     sync.Mutex
	client *client.Client // nil until it is needed
}

func newEngine(path string) *engine {
	return &engine{path: path, dial: func(ctx context.Context) (net.Conn, error) { return dial(ctx, path) }}
}

// newUserEngine returns an engine that must be the user's. The user can put a link to
// another engine's socket at the path, and name any of its containers.
func newUserEngine(path string, uid uint32) *engine {
	return &engine{path: path, dial: func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx, path)
		if err != nil {
			return nil, err
		}
		switch listener, err := listenerOf(conn); {
		case err != nil:
			return nil, errors.Join(err, conn.Close())
		case listener != uid:
			return nil, errors.Join(fmt.Errorf("socket %s: user %d listens there, not user %d", path, listener, uid), conn.Close())
		}
		return conn, nil
	}}
}

// inspect returns the description of a container. The error of [errdefs.IsNotFound] means
// that the engine has no such container.
func (e *engine) inspect(ctx context.Context, id string) (container.InspectResponse, error) {
	c, err := e.open()
	if err != nil {
		return container.InspectResponse{}, err
	}
	answer, err := c.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	found := answer.Container
	switch {
	case errdefs.IsNotFound(err):
		return container.InspectResponse{}, err
	case err == nil && (found.Config == nil || found.ID != id):
		err = errors.New("the answer is not the description of this container")
	case err != nil && ctx.Err() == nil:
		// The library does not say why it cannot connect.
		if conn, failed := e.dial(ctx); failed != nil {
			err = failed
		} else {
			_ = conn.Close() // was not used
		}
	}
	if err != nil {
		e.forget() // a restarted engine may be of another version
		return container.InspectResponse{}, err
	}
	return found, nil
}

func (e *engine) open() (*client.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client != nil {
		return e.client, nil
	}
	c, err := client.New(
		// One answer a connection, so that its size can be limited; and Podman's service,
		// which systemd starts for a connection, can end again.
		client.WithHTTPClient(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: client.CheckRedirect}),
		client.WithScheme("http"), // a copied transport looks as if it were for TLS
		client.WithHost("unix://"+e.path),
		client.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := e.dial(ctx)
			return &limitedConn{Conn: conn, left: maxAnswer}, err
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", e.path, err)
	}
	e.client = c
	return c, nil
}

// forget has the next call negotiate the version again. Calls in flight go on.
func (e *engine) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.client = nil
}

// limitedConn fails to read more than left bytes.
type limitedConn struct {
	net.Conn
	left int
}

func (c *limitedConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, fmt.Errorf("the answer has more than %d bytes", maxAnswer)
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// Reach returns nil if the agent can connect to the socket of an engine. Otherwise the
// error says why, and what to do.
func Reach(ctx context.Context, path string) error {
	conn, err := dial(ctx, path)
	if err != nil {
		return err
	}
	return conn.Close()
}

func dial(ctx context.Context, path string) (net.Conn, error) {
	return socket.Remote{
		What: "socket", Path: path,
		Missing: "start the engine, or correct the path",
		Denied:  "let the agent connect, for example with SupplementaryGroups=docker in its unit (whoever may connect has root's rights)",
		Refused: "start the engine",
	}.Dial(ctx)
}

// listenerOf returns the user that listens at the other end: the credentials of a
// connected socket are those of the process that called listen(2), unix(7).
func listenerOf(conn net.Conn) (uid uint32, err error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, failed); err != nil {
		return 0, fmt.Errorf("identify the listener: %w", err)
	}
	return cred.Uid, nil
}
