package workload

import (
	"bytes"
	"errors"
	"net"
	"slices"
	"testing"

	"golang.org/x/net/http2"
)

// sink is a connection that records what is written to it and fails when it is full.
type sink struct {
	net.Conn
	got  []byte
	room int
}

var errFull = errors.New("full")

func (s *sink) Write(b []byte) (int, error) {
	n := min(len(b), s.room)
	s.got, s.room = append(s.got, b[:n]...), s.room-n
	if n < len(b) {
		return n, errFull
	}
	return n, nil
}

// frames returns what the framer writes.
func frames(t *testing.T, write func(f *http2.Framer) error) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := write(http2.NewFramer(&out, nil)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// What is written goes out in its order, and nothing but the beginnings of an answer
// waits for what follows.
func TestJoinedWrites(t *testing.T) {
	t.Parallel()
	headers := func(end bool, size int) []byte {
		return frames(t, func(f *http2.Framer) error {
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, size), EndHeaders: true, EndStream: end})
		})
	}
	data := func(n int) []byte {
		return frames(t, func(f *http2.Framer) error { return f.WriteData(1, n == 0, make([]byte, n)) })[:frameHeader]
	}
	ping := frames(t, func(f *http2.Framer) error { return f.WritePing(true, [8]byte{1}) })
	settings := frames(t, func(f *http2.Framer) error { return f.WriteSettingsAck() })
	prefix, message := []byte{0, 0, 0, 3, 232}, bytes.Repeat([]byte{'m'}, 1000)
	type step struct {
		b     []byte
		waits bool
	}
	for name, steps := range map[string][]step{
		"first answer": {{headers(false, 20), true}, {data(1005), true}, {prefix, true}, {message, false}},
		"next answer":  {{data(1005), true}, {prefix, true}, {message, false}, {data(1005), true}, {prefix, true}, {message, false}},
		"in two frames": {{data(505), true}, {prefix, true}, {message[:500], false},
			{data(500), true}, {message[500:], false}},
		"in three parts":       {{data(1000), true}, {message[:300], false}, {message[300:600], false}, {message[600:], false}, {ping, false}},
		"ends in a short part": {{data(1000), true}, {message[:999], false}, {message[999:], false}, {settings, false}},
		"many short parts":     {{data(70), true}, {message[:50], true}, {message[:5], true}, {message[:5], false}, {message[:10], false}},
		"looks like a frame":   {{data(9), true}, {data(1), false}, {data(9), true}, {data(1), false}, {ping, false}},
		"ping in between":      {{headers(false, 20), true}, {ping, false}, {data(1005), true}, {prefix, true}, {message, false}},
		"status without data":  {{headers(true, 20), false}},
		"status at once":       {{headers(false, 20), true}, {headers(true, 20), false}},
		"large headers":        {{headers(false, heldMax), false}, {data(1005), true}, {prefix, true}, {message, false}},
		"end without data":     {{data(0), false}, {settings, false}, {ping, false}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := &sink{room: 1 << 20}
			c := coalescingConn{Conn: out}
			var want []byte
			for i, s := range steps {
				before := len(out.got)
				if n, err := c.Write(slices.Clone(s.b)); n != len(s.b) || err != nil {
					t.Fatalf("write %d: %d bytes of %d, %v", i, n, len(s.b), err)
				}
				want = append(want, s.b...)
				switch {
				case s.waits && len(out.got) != before:
					t.Errorf("write %d did not wait", i)
				case !s.waits && !bytes.Equal(out.got, want):
					t.Errorf("after write %d: %d bytes went out, want all %d in their order", i, len(out.got), len(want))
				}
			}
		})
	}
}

// If the connection accepts only a part, Write returns how much of its own bytes that is.
func TestFailedCoalescedWrite(t *testing.T) {
	t.Parallel()
	for room, want := range map[int]int{0: 0, frameHeader: 0, frameHeader + 4: 4, frameHeader + 99: 99} {
		c := coalescingConn{Conn: &sink{room: room}}
		header := []byte{0, 0, 100, typeData, 0, 0, 0, 0, 1}
		if _, err := c.Write(header); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Write(make([]byte, 100)); n != want || !errors.Is(err, errFull) {
			t.Errorf("room for %d: %d, %v, want %d", room, n, err, want)
		}
	}
}
