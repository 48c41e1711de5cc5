package systemd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/selector"
)

// bus is a system bus with systemd on it, at a socket.
type bus struct {
	t    *testing.T
	path string
	// answer answers a call, and may write to the connection before. Nil: as systemd does.
	answer func(c net.Conn, call *dbus.Message) *dbus.Message

	mu    sync.Mutex
	conns []net.Conn
	done  sync.WaitGroup
}

func newBus(t *testing.T) *bus {
	t.Helper()
	b := &bus{t: t, path: filepath.Join(t.TempDir(), "bus")}
	lis, err := net.Listen("unix", b.path)
	if err != nil {
		t.Fatal(err)
	}
	b.done.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			b.conns = append(b.conns, c)
			b.mu.Unlock()
			b.done.Go(func() { b.serve(c) })
		}
	})
	t.Cleanup(func() { lis.Close(); b.drop(); b.done.Wait() })
	return b
}

// drop closes all connections, and returns how many there were.
func (b *bus) drop() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(b.conns)
	for _, c := range b.conns {
		c.Close()
	}
	b.conns = nil
	return n
}

func (b *bus) serve(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	for line := ""; !strings.HasPrefix(line, "BEGIN"); {
		var err error
		if line, err = r.ReadString('\n'); err != nil {
			return
		}
		switch line = strings.TrimLeft(line, "\x00"); {
		case line == "AUTH\r\n":
			c.Write([]byte("REJECTED EXTERNAL\r\n"))
		case strings.HasPrefix(line, "AUTH EXTERNAL"):
			c.Write([]byte("OK 0123456789abcdef0123456789abcdef\r\n"))
		case strings.HasPrefix(line, "NEGOTIATE_UNIX_FD"):
			b.t.Error("the agent negotiates file descriptors")
		}
	}
	for {
		call, err := dbus.DecodeMessage(r)
		if err != nil {
			return
		}
		var reply *dbus.Message
		if b.answer != nil && member(call) != "Hello" {
			reply = b.answer(c, call)
		} else {
			reply = systemdAnswer(call)
		}
		if reply != nil {
			reply.EncodeTo(c, binary.LittleEndian)
		}
	}
}

func member(m *dbus.Message) string { return m.Headers[dbus.FieldMember].Value().(string) }

// respond returns the reply to a call.
func respond(call *dbus.Message, body ...any) *dbus.Message {
	return &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(call.Serial()),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(body...)),
	}, Body: body}
}

func refuse(call *dbus.Message, name, text string) *dbus.Message {
	m := respond(call, text)
	m.Type, m.Headers[dbus.FieldErrorName] = dbus.TypeError, dbus.MakeVariant(name)
	return m
}

// systemdAnswer answers that each process belongs to nginx.service.
func systemdAnswer(call *dbus.Message) *dbus.Message {
	const path = dbus.ObjectPath("/org/freedesktop/systemd1/unit/nginx_2eservice")
	switch member(call) {
	case "Hello":
		return respond(call, ":1.1")
	case "GetUnitByPID":
		if call.Body[0] == uint32(os.Getpid()) {
			return respond(call, path)
		}
	case "Get":
		if call.Headers[dbus.FieldPath].Value() == path && call.Body[0] == "org.freedesktop.systemd1.Unit" {
			return respond(call, dbus.MakeVariant(map[any]string{"Id": "nginx.service", "FragmentPath": "/lib/systemd/system/nginx.service"}[call.Body[1]]))
		}
	}
	return refuse(call, "org.freedesktop.DBus.Error.UnknownMethod", "no such method")
}

var ofNginx = []string{"systemd:id:nginx.service", "systemd:fragment_path:/lib/systemd/system/nginx.service"}

func self(t *testing.T) *attest.Peer {
	t.Helper()
	p, err := attest.FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func attestor(t *testing.T, path string) *Attestor {
	t.Helper()
	a := New(path)
	t.Cleanup(func() { a.Close() })
	return a
}

func texts(t *testing.T, a *Attestor, ctx context.Context) ([]string, error) {
	t.Helper()
	selectors, err := a.Attest(ctx, self(t))
	var out []string
	for _, s := range selectors {
		out = append(out, s.String())
	}
	return out, err
}

// A connection serves all callers. When it is lost, the next caller gets another one.
func TestUnitOfProcess(t *testing.T) {
	t.Parallel()
	if err := selector.Compare("systemd", ofNginx); err != nil {
		t.Error(err)
	}
	b := newBus(t)
	a := attestor(t, b.path)
	for round := range 3 {
		for range 3 {
			if got, err := texts(t, a, t.Context()); err != nil || !slices.Equal(got, ofNginx) {
				t.Fatalf("round %d: got %q, %v, want %q", round, got, err, ofNginx)
			}
		}
		if n := b.drop(); n != 1 {
			t.Errorf("round %d: %d connections, want 1", round, n)
		}
	}
	a.Close()
	if _, err := texts(t, a, t.Context()); err == nil || !strings.Contains(err.Error(), "agent is stopping") {
		t.Errorf("after Close: %v", err)
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	signal := func(size int) []byte {
		var out bytes.Buffer
		m := &dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/x")), dbus.FieldInterface: dbus.MakeVariant("a.b"),
			dbus.FieldMember: dbus.MakeVariant("Flood"), dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf([]byte{})),
		}, Body: []any{make([]byte, size)}}
		if err := m.EncodeTo(&out, binary.LittleEndian); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	flood := slices.Concat(signal(1<<20), signal(100), signal(maxMessage+1), signal(maxMessage))
	for name, tt := range map[string]struct {
		answer func(c net.Conn, call *dbus.Message) *dbus.Message
		want   []string
		err    string
	}{
		"no unit": {func(_ net.Conn, call *dbus.Message) *dbus.Message {
			return refuse(call, errNoUnit, "PID 1 does not belong to any loaded unit.")
		}, nil, ""},
		"unit unloaded meanwhile": {func(_ net.Conn, call *dbus.Message) *dbus.Message {
			if member(call) == "Get" {
				return refuse(call, "org.freedesktop.DBus.Error.UnknownObject", "Unknown object.")
			}
			return systemdAnswer(call)
		}, nil, "Unknown object."},
		"may not ask": {func(_ net.Conn, call *dbus.Message) *dbus.Message {
			return refuse(call, "org.freedesktop.DBus.Error.AccessDenied", "Sender is not authorized.")
		}, nil, "Sender is not authorized."},
		"another type": {func(_ net.Conn, call *dbus.Message) *dbus.Message {
			if member(call) == "Get" {
				return respond(call, dbus.MakeVariant(int32(7)))
			}
			return systemdAnswer(call)
		}, nil, "is no string"},
		"an answer of another form": {func(_ net.Conn, call *dbus.Message) *dbus.Message { return respond(call, int32(7)) }, nil, "unit of process"},
		"garbage":                   {func(c net.Conn, _ *dbus.Message) *dbus.Message { c.Write(bytes.Repeat([]byte("x"), 100)); return nil }, nil, "unit of process"},
		"connection lost each time": {func(c net.Conn, _ *dbus.Message) *dbus.Message { c.Close(); return nil }, nil, "unit of process"},
		"hangs":                     {func(net.Conn, *dbus.Message) *dbus.Message { return nil }, nil, context.DeadlineExceeded.Error()},
		"signals of other users": {func(c net.Conn, call *dbus.Message) *dbus.Message {
			c.Write(flood)
			return systemdAnswer(call)
		}, ofNginx, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBus(t)
			b.answer = tt.answer
			limit := 10 * time.Second
			if name == "hangs" || name == "garbage" {
				limit = 200 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			got, err := texts(t, attestor(t, b.path), ctx)
			if !slices.Equal(got, tt.want) || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %q, %v, want %q, error with %q", got, err, tt.want, tt.err)
			}
		})
	}
}

func TestNoBus(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	lis, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	lis.(*net.UnixListener).SetUnlinkOnClose(false)
	lis.Close()
	alone := newBus(t)
	alone.answer = func(_ net.Conn, call *dbus.Message) *dbus.Message {
		return refuse(call, "org.freedesktop.DBus.Error.ServiceUnknown", "The name is not activatable")
	}
	closed := newBus(t)
	closed.answer = func(_ net.Conn, call *dbus.Message) *dbus.Message {
		return refuse(call, "org.freedesktop.DBus.Error.AccessDenied", "Sender is not authorized.")
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "does not exist: start D-Bus",
		stale:                      "nobody listens: start D-Bus",
		alone.path:                 "systemd is not on this bus",
		closed.path:                "ask systemd: Sender is not authorized.",
	} {
		if err := Reach(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("Reach %s: %v, want %q", path, err, want)
		}
	}
	outside := newBus(t)
	outside.answer = func(_ net.Conn, call *dbus.Message) *dbus.Message {
		return refuse(call, errNoUnit, "PID 1 does not belong to any loaded unit.")
	}
	for _, path := range []string{newBus(t).path, outside.path} {
		if err := Reach(t.Context(), path); err != nil {
			t.Errorf("with systemd: %v", err)
		}
	}
	if _, err := texts(t, attestor(t, stale), t.Context()); err == nil || !strings.Contains(err.Error(), "nobody listens") {
		t.Errorf("attest: %v", err)
	}
}

// Whatever arrives, at most maxMessage bytes reach the library for each message, and what
// follows a message that was dropped is read as the next one.
func FuzzMessages(f *testing.F) {
	f.Add([]byte("l\x04\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"))
	f.Add(append([]byte("B\x04\x00\x01\x00\x00\x00\x03\x00\x00\x00\x01\x00\x00\x00\x05"), make([]byte, 11)...))
	f.Add([]byte("l\x04\x00\x01\x00\x00\x10\x00\x01\x00\x00\x00\x00\x00\x00\x00 of 1 MiB"))
	f.Fuzz(func(t *testing.T, data []byte) {
		here, there := net.Pipe()
		defer here.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			there.Write(data)
			there.Close()
		}()
		defer func() { here.Close(); <-done }()
		m := &messages{Conn: here, begun: true}
		var got []byte
		for buf := make([]byte, 7); ; {
			n, err := m.Read(buf)
			got = append(got, buf[:n]...)
			if err != nil {
				break
			}
		}
		var want []byte
		for len(data) >= 16 {
			var order binary.ByteOrder = binary.LittleEndian
			if data[0] == 'B' {
				order = binary.BigEndian
			}
			size := 16 + uint64(order.Uint32(data[4:])) + (uint64(order.Uint32(data[12:]))+7)/8*8
			whole := data[:min(size, uint64(len(data)))]
			if size <= maxMessage {
				want = append(want, whole...)
			}
			data = data[len(whole):]
		}
		if !bytes.Equal(got, want) {
			t.Errorf("got %x, want %x", got, want)
		}
	})
}
