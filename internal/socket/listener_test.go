package socket

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// echo is a listener that echoes everything.
type echo struct {
	*Listener
	t    *testing.T
	logs bytes.Buffer
	log  *slog.Logger
	done sync.WaitGroup
}

func newEcho(t *testing.T, path string) *echo {
	t.Helper()
	lis, err := Listen(path, 0o770)
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{Listener: lis, t: t}
	e.log = slog.New(slog.NewTextHandler(&e.logs, nil))
	e.done.Go(func() {
		for {
			conn, err := e.Accept()
			if err != nil {
				return
			}
			e.done.Go(func() { defer conn.Close(); io.Copy(conn, conn) })
		}
	})
	t.Cleanup(func() { e.Close(); e.done.Wait() })
	return e
}

// connect dials the path.
func connect(t *testing.T, path string) (net.Conn, error) {
	conn, err := net.Dial("unix", path)
	if err == nil {
		t.Cleanup(func() { conn.Close() })
	}
	return conn, err
}

// works checks that the other end of a connection is an echo.
func works(conn net.Conn) error {
	if _, err := conn.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}

// reached fails the test unless new clients reach the listener.
func (e *echo) reached() {
	e.t.Helper()
	conn, err := connect(e.t, e.path)
	if err == nil {
		err = works(conn)
	}
	if err != nil {
		e.t.Errorf("new client: %v", err)
	}
	if err := e.Err(); err != nil {
		e.t.Errorf("Err: %v", err)
	}
}

// lines returns the messages logged since the last call.
func (e *echo) lines() []string {
	var out []string
	for line := range strings.Lines(e.logs.String()) {
		_, text, _ := strings.Cut(line, "msg=")
		out = append(out, strings.Split(text, `"`)[1])
	}
	e.logs.Reset()
	return out
}

func TestSocketFileRecreated(t *testing.T) {
	t.Parallel()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	const recreated = "[socket file recreated]"
	for name, tt := range map[string]struct {
		harm func(path string)
		want string // in the log, after two checks
	}{
		"untouched":          {func(string) {}, "[]"},
		"removed":            {func(path string) { must(os.Remove(path)) }, recreated},
		"moved away":         {func(path string) { must(os.Rename(path, path+".old")) }, recreated},
		"moved and back":     {func(path string) { must(os.Rename(path, path+".x")); must(os.Rename(path+".x", path)) }, "[]"},
		"rights changed":     {func(path string) { must(os.Chmod(path, 0o700)) }, "[]"},
		"folder removed":     {func(path string) { must(os.RemoveAll(filepath.Dir(path))) }, recreated},
		"folder moved away":  {func(path string) { must(os.Rename(filepath.Dir(path), filepath.Dir(path)+".old")) }, recreated},
		"folder replaced":    {func(path string) { must(os.RemoveAll(filepath.Dir(path))); must(os.Mkdir(filepath.Dir(path), 0o700)) }, recreated},
		"left by the killed": {func(path string) { must(os.Remove(path)); leave(t, path) }, recreated},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "run", "api.sock")
			e := newEcho(t, path)
			open, err := connect(t, path)
			if err != nil {
				t.Fatal(err)
			}
			before, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			tt.harm(path)
			e.check(e.log)
			e.check(e.log)
			e.reached()
			if err := works(open); err != nil {
				t.Errorf("a connection that was open: %v", err)
			}
			if got := fmt.Sprint(e.lines()); got != tt.want {
				t.Errorf("logged %s, want %s", got, tt.want)
			}
			after, err := os.Stat(path)
			if err != nil || tt.want == recreated && after.Mode() != before.Mode() {
				t.Errorf("mode %v, %v, want %v", after.Mode(), err, before.Mode())
			}
			e.Close()
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("after Close the file is there: %v", err)
			}
		})
	}
}

// leave creates a socket file without a listener.
func leave(t *testing.T, path string) {
	t.Helper()
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	lis.SetUnlinkOnClose(false)
	lis.Close()
}

// TestEarlierSocketsAreServed: a container that has the socket file itself mounted reaches
// the process through that file after the socket was recreated.
func TestEarlierSocketsAreServed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "api.sock")
	e := newEcho(t, path)
	for i := range 3 * maxListening {
		// A hard link is another name of the file, like a mount.
		mounted := filepath.Join(dir, fmt.Sprint("mounted", i))
		if err := os.Link(path, mounted); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		e.check(e.log)
		e.reached()
		for back, want := range map[int]bool{0: true, maxListening - 2: true, maxListening - 1: false} {
			if back > i {
				continue
			}
			conn, err := connect(t, filepath.Join(dir, fmt.Sprint("mounted", i-back)))
			if err == nil {
				err = works(conn)
			}
			if (err == nil) != want {
				t.Errorf("the socket of %d before: %v, want it reached: %v", back+1, err, want)
			}
		}
	}
}

// TestSocketPathInUse: the listener does not replace the socket of another process or
// another file, and Err reports it. When the path is free, the socket is recreated.
func TestSocketPathInUse(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		take func(t *testing.T, path string, e *echo) (free func())
		want string
	}{
		"another process": {func(t *testing.T, path string, _ *echo) func() { return listenElsewhere(t, path) }, "another process listens on it"},
		"another process, under the same inode number": {func(t *testing.T, path string, e *echo) func() {
			free := listenElsewhere(t, path)
			ours, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			for theirs := ours; ctime(theirs) == ctime(ours); {
				if err := os.Chmod(path, 0o777); err != nil {
					t.Fatal(err)
				}
				if theirs, err = os.Lstat(path); err != nil {
					t.Fatal(err)
				}
			}
			e.file = ours
			return free
		}, "another process listens on it"},
		"a file": {func(t *testing.T, path string, _ *echo) func() {
			if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			return func() {
				if data, err := os.ReadFile(path); string(data) != "precious" {
					t.Errorf("the file was harmed: %q, %v", data, err)
				}
				os.Remove(path)
			}
		}, "not a socket"},
		"a file for the folder": {func(t *testing.T, path string, _ *echo) func() {
			dir := filepath.Dir(path)
			if err := os.Remove(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(dir) }
		}, "create its folder"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "run", "api.sock")
			e := newEcho(t, path)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			free := tt.take(t, path, e)
			for range 3 {
				e.check(e.log)
			}
			if err := e.Err(); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("Err: %v, want %q with the path", err, tt.want)
			}
			if got := fmt.Sprint(e.lines()); got != "[socket file missing]" {
				t.Errorf("logged %s", got)
			}
			free()
			e.check(e.log)
			e.reached()
			if got := fmt.Sprint(e.lines()); got != "[socket file recreated]" {
				t.Errorf("logged %s", got)
			}
		})
	}
}

// TestCloseKeepsTheSocketOfAnother: Close does not remove the socket of another process.
func TestCloseKeepsTheSocketOfAnother(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "api.sock")
	e := newEcho(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	free := listenElsewhere(t, path)
	defer free()
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := connect(t, path); err != nil || works(conn) != nil {
		t.Errorf("the other process is not reached: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	if _, err := e.Accept(); err == nil {
		t.Error("accepted after Close")
	}
}

// TestCloseDuringRecreation: Close leaves no file behind while the socket is recreated.
func TestCloseDuringRecreation(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "api.sock")
	for range 100 {
		lis, err := Listen(path, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		var checks sync.WaitGroup
		checks.Go(func() { lis.check(slog.New(slog.DiscardHandler)) })
		if err := lis.Close(); err != nil {
			t.Error(err)
		}
		checks.Wait()
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Fatalf("after Close the file is there: %v", err)
		}
	}
}
