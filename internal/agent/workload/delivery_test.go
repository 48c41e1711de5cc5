package workload

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// rawClient is an HTTP/2 client that reads only while read runs.
type rawClient struct {
	conn   net.Conn
	mu     sync.Mutex // held while a frame is written
	framer *http2.Framer
	data   atomic.Int64 // bytes of DATA frames received
}

// openRaw opens FetchX509SVID on conn, with a flow-control window of that many bytes.
func openRaw(t *testing.T, conn net.Conn, window uint32) *rawClient {
	t.Helper()
	c := &rawClient{conn: conn, framer: http2.NewFramer(conn, conn)}
	var block bytes.Buffer
	headers := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/SpiffeWorkloadAPI/FetchX509SVID"},
		{Name: ":authority", Value: "x"}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
		{Name: securityHeader, Value: "true"},
	} {
		if err := headers.WriteField(f); err != nil {
			t.Fatal(err)
		}
	}
	_, err := io.WriteString(conn, http2.ClientPreface)
	for _, write := range []func() error{
		func() error {
			return c.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
		},
		func() error {
			return c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
		},
		func() error { return c.framer.WriteData(1, true, make([]byte, 5)) },
	} {
		if err == nil {
			err = write()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// read reads until the connection ends.
func (c *rawClient) read() {
	for {
		f, err := c.framer.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			c.data.Add(int64(len(f.Data())))
		case *http2.SettingsFrame:
			if !f.IsAck() {
				c.mu.Lock()
				_ = c.framer.WriteSettingsAck() // the next read fails, too
				c.mu.Unlock()
			}
		}
	}
}

// widen extends the window of the stream by that many bytes.
func (c *rawClient) widen(bytes uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.framer.WriteWindowUpdate(1, bytes)
}

// streams returns how many streams count against the authority.
func (s *system) streams(a *authority) int {
	for _, u := range s.cache.Authorities() {
		if u.Authority == bundle.AuthorityID(a.cert) {
			return u.Streams
		}
	}
	return 0
}

// An answer that gRPC has queued, because the window is closed, has not been read.
// Once the client opens the window, it reads the answer and then the newest one.
func TestQueuedAnswerIsNotRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSystem(t, nil)
		e := entry("e1", "/one", 1000)
		s.cache.Update([]*cache.Entry{e}, nil)
		a, b := s.ca, newAuthority(t, td, "b")
		s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 2, a, b)})
		s.put(e)
		conn, err := s.lis.dial(t.Context(), 1000)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := openRaw(t, conn, 0)
		done := make(chan struct{})
		go func() { defer close(done); c.read() }()
		time.Sleep(time.Second)
		s.ca = b
		s.put(e)
		time.Sleep(10 * time.Second)
		if n := c.data.Load(); n != 0 {
			t.Fatalf("%d bytes came through a closed window", n)
		}
		if s.streams(a) != 1 {
			t.Errorf("the stream does not count against the authority of what is queued")
		}
		if err := c.widen(1 << 20); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2*maxReadPause + time.Second)
		if s.streams(a) != 0 || s.streams(b) != 1 {
			t.Errorf("all read: %d count against the first authority and %d against the second, want 0 and 1", s.streams(a), s.streams(b))
		}
		conn.Close()
		<-done
	})
}

// What the kernel holds for a client that reads nothing has not been read.
func TestAnswerInTheSocketIsNotRead(t *testing.T) {
	t.Parallel()
	s, path, e := serveSocket(t, nil)
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := openRaw(t, conn, 1<<20)
	a, b := s.ca, newAuthority(t, td, "b")
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not within 20 s", what)
			}
		}
	}
	until("first answer sent", func() bool { return s.streams(a) == 1 })
	s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 2, a, b)})
	s.ca = b
	s.put(e)
	time.Sleep(3 * PushSpacing) // longer than the server waits before it checks
	if s.streams(a) != 1 {
		t.Error("a stream that has read nothing does not count against the authority of what it was sent")
	}
	done := make(chan struct{})
	go func() { defer close(done); c.read() }()
	until("all read", func() bool { return s.streams(a) == 0 && s.streams(b) == 1 })
	conn.Close()
	<-done
}

// Whatever a client does after an answer was written to its socket, the server knows
// whether the client has read it.
func TestAnswerReadByPeer(t *testing.T) {
	t.Parallel()
	const answer = "the answer"
	for name, tt := range map[string]struct {
		peer func(t *testing.T, c *net.UnixConn)
		want bool
	}{
		"reads nothing":                     {func(*testing.T, *net.UnixConn) {}, false},
		"reads all":                         {func(t *testing.T, c *net.UnixConn) { take(t, c, len(answer)) }, true},
		"reads a part":                      {func(t *testing.T, c *net.UnixConn) { take(t, c, len(answer)-1) }, false},
		"reads all and closes":              {func(t *testing.T, c *net.UnixConn) { take(t, c, len(answer)); c.Close() }, true},
		"closes":                            {func(_ *testing.T, c *net.UnixConn) { c.Close() }, false},
		"reads a part and closes":           {func(t *testing.T, c *net.UnixConn) { take(t, c, 1); c.Close() }, false},
		"shuts down its side":               {func(_ *testing.T, c *net.UnixConn) { c.CloseWrite() }, false},
		"reads a part, shuts down its side": {func(t *testing.T, c *net.UnixConn) { take(t, c, 1); c.CloseWrite() }, false},
		"shuts down its reading":            {func(t *testing.T, c *net.UnixConn) { c.CloseRead() }, false},
		"reads all and shuts down its side": {func(t *testing.T, c *net.UnixConn) { take(t, c, len(answer)); c.CloseWrite() }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, client := unixPair(t)
			c := &peerConn{coalescingConn: coalescingConn{Conn: server}, close: func() {}}
			data := []byte(answer)
			d := c.track(mem.SliceBuffer(data))
			defer c.untrack(d)
			if c.wasRead(d) {
				t.Error("read before it was written")
			}
			if _, err := c.Write(data); err != nil {
				t.Fatal(err)
			}
			tt.peer(t, client)
			before := c.wasRead(d)
			// gRPC reads all the time; here only a close ends the read.
			if err := server.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err := server.Read(make([]byte, 1)); !os.IsTimeout(err) {
				c.readFailed(err)
			}
			if after := c.wasRead(d); after != tt.want || (before && !after) {
				t.Errorf("before the end of its side was read: %v, after: %v, want %v", before, after, tt.want)
			}
		})
	}
}

// A stream may end before gRPC has read the end of the connection, whether the client
// has read everything or not. A write that fails with EPIPE gives no information.
func TestAnswerReadBeforeClose(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		take int
		want bool
	}{"all": {10, true}, "a part": {9, false}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, client := unixPair(t)
			c := &peerConn{coalescingConn: coalescingConn{Conn: server}, close: func() {}}
			data := []byte("the answer")
			d := c.track(mem.SliceBuffer(data))
			defer c.untrack(d)
			if _, err := c.Write(data); err != nil {
				t.Fatal(err)
			}
			take(t, client, tt.take)
			client.Close()
			if c.wasRead(d) {
				t.Error("counted as read before the end of the connection was read")
			}
			synctest.Test(t, func(t *testing.T) {
				done := make(chan bool)
				go func() { done <- c.wasReadAtEnd(d) }()
				synctest.Wait()
				if _, err := c.Write(data); err == nil {
					t.Error("a write to a closed connection succeeds")
				}
				if _, err := c.Read(make([]byte, 1)); err == nil {
					t.Error("the connection is still open")
				}
				if got := <-done; got != tt.want {
					t.Errorf("read: %v, want %v", got, tt.want)
				}
			})
		})
	}
}

// No other answer gets the memory of a tracked one.
func TestTrackedAnswerKeepsItsMemory(t *testing.T) {
	t.Parallel()
	c := &peerConn{}
	answer := fill(4000, func(b []byte) []byte { return b[:4000] })
	d := c.track(answer)
	answer.Free() // as gRPC does once it has written it
	for range 100 {
		other := fill(4000, func(b []byte) []byte { return b[:4000] })
		if &other.ReadOnlyData()[3999] == d.last {
			t.Fatal("another answer has its memory")
		}
	}
	c.untrack(d)
}

func take(t *testing.T, c net.Conn, n int) {
	t.Helper()
	if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

// unixPair returns the two ends of a connection.
func unixPair(t *testing.T) (server, client *net.UnixConn) {
	t.Helper()
	lis, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	c, err := (&net.Dialer{}).DialContext(context.Background(), "unix", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); c.Close() })
	return s.(*net.UnixConn), c.(*net.UnixConn)
}

// watchSource is a workload with the reference client, until its standard input ends.
func watchSource(path string) error {
	source, err := workloadapi.NewX509Source(context.Background(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+path)))
	if err != nil {
		return err
	}
	defer source.Close()
	_, _ = os.Stdin.Read(make([]byte, 1))
	return nil
}

// A stopped process counts until it continues and has read its replacement, or is
// killed.
func TestStoppedProcessIsCounted(t *testing.T) {
	t.Parallel()
	s, path, e := serveSocket(t, nil)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), clientEnv+"=watch "+path+" 1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	defer cmd.Process.Kill()
	signal := func(sig syscall.Signal) {
		t.Helper()
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not within 30 s: %+v", what, s.cache.Authorities())
			}
		}
	}
	// kill(2) returns before every thread of the process has stopped.
	stopped := func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		return err == nil && bytes.Contains(status, []byte("State:\tT"))
	}
	a, b, c := s.ca, newAuthority(t, td, "b"), newAuthority(t, td, "c")
	until("first answer", func() bool { return s.streams(a) == 1 })
	s.cache.SetBundle(&bundle.Snapshot{Own: bundleOf(t, td, 2, a, b, c)})
	time.Sleep(3 * PushSpacing)

	signal(syscall.SIGSTOP)
	until("stopped", stopped)
	s.ca = b
	s.put(e)
	time.Sleep(6 * PushSpacing)
	if s.streams(a) != 1 {
		t.Errorf("stopped before it has read its replacement, and not counted: %+v", s.cache.Authorities())
	}
	signal(syscall.SIGCONT)
	until("replacement read", func() bool { return s.streams(a) == 0 && s.streams(b) == 1 })

	signal(syscall.SIGSTOP)
	until("stopped", stopped)
	s.ca = c
	s.put(e)
	time.Sleep(6 * PushSpacing)
	if s.streams(b) != 1 {
		t.Errorf("stopped again, and not counted: %+v", s.cache.Authorities())
	}
	signal(syscall.SIGKILL)
	_ = cmd.Wait() // killed
	until("gone", func() bool {
		s.cache.Sweep(attest.Life)
		return s.streams(b)+s.streams(c) == 0
	})
}
