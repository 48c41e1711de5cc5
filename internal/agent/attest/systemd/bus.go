package systemd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/renewd/renewd/internal/socket"
)

const (
	// connectTimeout is how long the handshake with the bus may take.
	connectTimeout = 2 * time.Second
	// maxMessage is the size of a message in bytes. systemd's answers have some hundred;
	// any user of the node can send the agent signals of 32 MiB.
	maxMessage = 64 << 10
)

// connect connects to the bus and authenticates. The connection does not support file
// descriptors, so that the bus delivers none.
func connect(ctx context.Context, path string) (*dbus.Conn, error) {
	raw, err := socket.Remote{
		What: "system bus", Path: path,
		Missing: "start D-Bus, or let the agent see its socket", Denied: "let the agent connect", Refused: "start D-Bus",
	}.Dial(ctx)
	if err != nil {
		return nil, err
	}
	if err := raw.SetDeadline(time.Now().Add(connectTimeout)); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	conn, err := dbus.NewConn(&messages{Conn: raw})
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	if err = conn.Auth(nil); err == nil {
		err = conn.Hello()
	}
	if err == nil {
		err = raw.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = conn.Close() // err is the one to report
		return nil, fmt.Errorf("system bus %s: %w", path, err)
	}
	return conn, nil
}

// Reach returns nil if the agent can ask systemd on the bus. Otherwise the error says why,
// and what to do.
func Reach(ctx context.Context, path string) error {
	conn, err := connect(ctx, path)
	if err != nil {
		return err
	}
	defer conn.Close()
	var answered dbus.Error
	switch _, err := unitOf(ctx, conn, os.Getpid()); {
	case err == nil, errors.As(err, &answered) && answered.Name == errNoUnit:
		return nil
	case answered.Name == "org.freedesktop.DBus.Error.ServiceUnknown":
		return fmt.Errorf("system bus %s: systemd is not on this bus: remove the attestor on a node without systemd", path)
	default:
		return fmt.Errorf("system bus %s: ask systemd: %w", path, err)
	}
}

// messages is a connection that drops incoming messages above maxMessage.
type messages struct {
	net.Conn
	begun bool // the handshake is over: messages follow
	head  []byte
	left  int64 // bytes of the message that follow head
}

// Write implements [net.Conn].
func (m *messages) Write(p []byte) (int, error) {
	// The client's last line of the handshake. Reading messages begins after it.
	if !m.begun && bytes.HasPrefix(p, []byte("BEGIN")) {
		m.begun = true
	}
	return m.Conn.Write(p)
}

// Read implements [net.Conn].
func (m *messages) Read(p []byte) (int, error) {
	if !m.begun {
		return m.Conn.Read(p)
	}
	for len(m.head) == 0 && m.left == 0 {
		if err := m.next(); err != nil {
			return 0, err
		}
	}
	if len(m.head) > 0 {
		n := copy(p, m.head)
		m.head = m.head[n:]
		return n, nil
	}
	n, err := m.Conn.Read(p[:min(int64(len(p)), m.left)])
	m.left -= int64(n)
	return n, err
}

// next reads the beginning of a message: its byte order, and the lengths of its body and of
// its header fields (D-Bus Specification, "Message Format"). It drops one that is too long.
func (m *messages) next() error {
	const fixed = 16
	head := make([]byte, fixed)
	if _, err := io.ReadFull(m.Conn, head); err != nil {
		return err
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[0] == 'B' {
		order = binary.BigEndian
	}
	body, fields := int64(order.Uint32(head[4:])), int64(order.Uint32(head[12:]))
	rest := (fields+7)/8*8 + body // the body begins at a multiple of 8
	if fixed+rest > maxMessage {
		_, err := io.CopyN(io.Discard, m.Conn, rest)
		return err
	}
	m.head, m.left = head, rest
	return nil
}
