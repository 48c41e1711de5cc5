// Package systemd attests a process by the systemd unit that it belongs to. Its selectors
// are those of SPIRE's attestor of the same name:
//
//	systemd:id:nginx.service                                    the unit's name
//	systemd:fragment_path:/lib/systemd/system/nginx.service     its file, empty if there is none
//
// systemd answers by PID on the system bus. [attest.Selectors] checks afterwards that the
// process lives, so the PID was its own all the time; GetUnitByPIDFD would add nothing.
// It would take file descriptors on the connection, and any user of the node could send
// some that the D-Bus library never closes.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/godbus/dbus/v5"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// Name is the attestor's name and the type of its selectors.
const Name = "systemd"

// Names on the bus: org.freedesktop.systemd1(5).
const (
	service   = "org.freedesktop.systemd1"
	manager   = dbus.ObjectPath("/org/freedesktop/systemd1")
	unitOfPID = "org.freedesktop.systemd1.Manager.GetUnitByPID"
	property  = "org.freedesktop.DBus.Properties.Get"
	unit      = "org.freedesktop.systemd1.Unit"
	errNoUnit = "org.freedesktop.systemd1.NoUnitForPID"
)

// Attestor is an [attest.Attestor]. Make it with [New], and close it.
type Attestor struct {
	socket string

	mu     sync.Mutex // also held while it connects
	conn   *dbus.Conn // nil until it is needed
	closed bool
}

var _ attest.Attestor = (*Attestor)(nil)

// New returns the attestor. socket is the path of the system bus's Unix socket. It connects
// when it is needed, and again after the connection was lost.
func New(socket string) *Attestor { return &Attestor{socket: socket} }

// Close closes the connection.
func (a *Attestor) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	if a.conn == nil {
		return nil
	}
	return a.conn.Close()
}

// Name returns "systemd".
func (a *Attestor) Name() string { return Name }

// Attest asks systemd for the unit of the process. There are no selectors if it belongs to
// none.
func (a *Attestor) Attest(ctx context.Context, p *attest.Peer) ([]cache.Selector, error) {
	for {
		conn, isNew, err := a.connection(ctx)
		if err != nil {
			return nil, err
		}
		found, err := unitOf(ctx, conn, p.PID())
		var answered dbus.Error
		switch {
		case err == nil:
			return found, nil
		case errors.As(err, &answered) && answered.Name == errNoUnit:
			return nil, nil
		case errors.As(err, &answered), isNew, ctx.Err() != nil:
			return nil, fmt.Errorf("ask systemd for the unit of process %d: %w", p.PID(), err)
		}
		// The connection was lost, as when the bus is restarted: try another one.
		_ = conn.Close()
	}
}

// unitOf returns the selectors of the unit of a process.
func unitOf(ctx context.Context, conn *dbus.Conn, pid int) ([]cache.Selector, error) {
	var path dbus.ObjectPath
	if err := conn.Object(service, manager).CallWithContext(ctx, unitOfPID, 0, uint32(pid)).Store(&path); err != nil {
		return nil, err
	}
	var out []cache.Selector
	for _, field := range []struct{ property, selector string }{{"Id", "id:"}, {"FragmentPath", "fragment_path:"}} {
		var value dbus.Variant
		if err := conn.Object(service, path).CallWithContext(ctx, property, 0, unit, field.property).Store(&value); err != nil {
			return nil, fmt.Errorf("%s of %s: %w", field.property, path, err)
		}
		text, ok := value.Value().(string)
		if !ok {
			return nil, fmt.Errorf("%s of %s is no string", field.property, path)
		}
		out = append(out, cache.Selector{Type: Name, Value: field.selector + text})
	}
	return out, nil
}

// connection returns the connection to the bus, and whether it was made just now.
func (a *Attestor) connection(ctx context.Context) (conn *dbus.Conn, isNew bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed:
		return nil, false, errors.New("agent is stopping")
	case a.conn != nil && a.conn.Connected():
		return a.conn, false, nil
	}
	if conn, err = connect(ctx, a.socket); err != nil {
		return nil, false, err
	}
	a.conn = conn
	return conn, true, nil
}
