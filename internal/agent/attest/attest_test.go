package attest_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// TestMain also makes the test binary a workload: it connects to the socket in
// RENEWD_TEST_SOCKET and waits until its standard input ends, without its main
// thread if RENEWD_TEST_MAIN_THREAD is "ends".
func TestMain(m *testing.M) {
	path := os.Getenv("RENEWD_TEST_SOCKET")
	if path == "" {
		os.Exit(m.Run())
	}
	if os.Getenv("RENEWD_TEST_MAIN_THREAD") != "ends" {
		beWorkload(path)
		return
	}
	go func() {
		for mainThreadLives() {
			time.Sleep(time.Millisecond)
		}
		beWorkload(path)
		os.Exit(0)
	}()
	syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0) // only this thread
}

func init() {
	runtime.LockOSThread() // TestMain runs on the main thread
}

func mainThreadLives() bool {
	_, err := os.Readlink("/proc/self/exe")
	return err == nil
}

func beWorkload(path string) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	os.Stdin.Read(make([]byte, 1))
}

// workload starts a process and returns it with the server's end of its connection.
func workload(t *testing.T, env ...string) (cmd *exec.Cmd, conn *net.UnixConn, end func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), "RENEWD_TEST_SOCKET="+path), env...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() { stdin.Close() }
	t.Cleanup(func() { end(); cmd.Wait() })
	lis.(*net.UnixListener).SetDeadline(time.Now().Add(10 * time.Second))
	c, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return cmd, c.(*net.UnixConn), end
}

func TestPeerOfConnection(t *testing.T) {
	t.Parallel()
	cmd, conn, end := workload(t)
	p, err := attest.FromConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.PID() != cmd.Process.Pid || p.UID() != uint32(os.Geteuid()) || p.GID() != uint32(os.Getegid()) {
		t.Errorf("got PID %d, UID %d, GID %d", p.PID(), p.UID(), p.GID())
	}
	if err := p.Alive(); err != nil {
		t.Errorf("while it runs: %v", err)
	}
	end()
	waitGone(t, p)
	// It is a zombie now: it has exited and its PID is still in use.
	if err := syscall.Kill(cmd.Process.Pid, 0); err != nil {
		t.Errorf("the process was reaped: %v", err)
	}
	cmd.Wait()
	if err := p.Alive(); !errors.Is(err, attest.ErrGone) {
		t.Errorf("after it was reaped: %v, want ErrGone", err)
	}
	p.Close()
	if err := p.Alive(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// A process that exited before its connection was accepted is not found by its PID,
// even if another process has that PID.
func TestPeerThatEndedBeforeAccept(t *testing.T) {
	t.Parallel()
	cmd, conn, end := workload(t)
	end()
	cmd.Wait()
	p, err := attest.FromConn(conn)
	if err == nil {
		defer p.Close()
		err = p.Alive()
	}
	if !errors.Is(err, attest.ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
}

func waitGone(t *testing.T, p *attest.Peer) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if errors.Is(p.Alive(), attest.ErrGone) {
			return
		}
	}
	t.Fatal("the process still counts as alive")
}

type fake struct {
	name      string
	selectors []cache.Selector
	err       error
	do        func()
}

func (f fake) Name() string { return f.name }
func (f fake) Attest(context.Context, *attest.Peer) ([]cache.Selector, error) {
	if f.do != nil {
		f.do()
	}
	return f.selectors, f.err
}

// If the PID of the caller is reused while an attestor reads, the result is not used.
func TestSelectorsOfReusedPID(t *testing.T) {
	t.Parallel()
	cmd, conn, end := workload(t)
	p, err := attest.FromConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	someone := fake{name: "unix", selectors: []cache.Selector{{Type: "unix", Value: "uid:0"}}, do: func() {
		end()
		cmd.Wait()
		reusePID(t, cmd.Process.Pid)
	}}
	found, err := attest.Selectors(t.Context(), p, []attest.Attestor{someone})
	if !errors.Is(err, attest.ErrGone) || found != nil {
		t.Errorf("got %v, %v, want ErrGone", found, err)
	}
}

// reusePID starts a process with the PID if possible: that requires root, and fails
// if another process takes the PID first.
func reusePID(t *testing.T, pid int) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
		t.Logf("the PID cannot be reused on purpose here: %v", err)
		return
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	t.Logf("PID %d was taken by process %d", pid, cmd.Process.Pid)
}

func TestSelectorsOfSeveralAttestors(t *testing.T) {
	t.Parallel()
	a, b := cache.Selector{Type: "unix", Value: "uid:1"}, cache.Selector{Type: "docker", Value: "env:A=B"}
	one, two := fake{name: "unix", selectors: []cache.Selector{a}}, fake{name: "docker", selectors: []cache.Selector{b}}
	broken := fake{name: "k8s", err: errors.New("kubelet is down")}
	for name, tt := range map[string]struct {
		attestors []attest.Attestor
		want      []cache.Selector
		missing   []string
	}{
		"all answer":        {[]attest.Attestor{one, two}, []cache.Selector{a, b}, nil},
		"one fails":         {[]attest.Attestor{broken, one, two}, []cache.Selector{a, b}, []string{"k8s"}},
		"all fail":          {[]attest.Attestor{broken, fake{name: "unix", err: broken.err}}, nil, []string{"k8s", "unix"}},
		"one fails in part": {[]attest.Attestor{fake{name: "k8s", selectors: []cache.Selector{b}, err: broken.err}, one}, []cache.Selector{b, a}, []string{"k8s"}},
		"nothing to say":    {[]attest.Attestor{fake{name: "unix"}}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := attest.FromPID(os.Getpid(), 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			found, err := attest.Selectors(t.Context(), p, tt.attestors)
			if err != nil || !slices.Equal(found.Selectors(), tt.want) || !slices.Equal(found.Missing(), tt.missing) {
				t.Errorf("got %v, missing %v, error %v", found.Selectors(), found.Missing(), err)
			}
			for i, f := range found {
				want := tt.attestors[i].(fake)
				if f.Attestor != want.name || !errors.Is(f.Err, want.err) {
					t.Errorf("finding %d: %+v of %q", i, f, want.name)
				}
			}
		})
	}
}

// self returns this process as a Peer.
func self(t *testing.T) *attest.Peer {
	t.Helper()
	p, err := attest.FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// Attestors run side by side: all together take as long as the slowest.
func TestSelectorsSideBySide(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var attestors []attest.Attestor
		for i := range 4 {
			attestors = append(attestors, fake{name: fmt.Sprint(i), do: func() { time.Sleep(time.Duration(i) * time.Second) }})
		}
		start := time.Now()
		found, err := attest.Selectors(t.Context(), self(t), attestors)
		if took := time.Since(start); err != nil || took != 3*time.Second {
			t.Errorf("took %v, %v, want 3s", took, err)
		}
		for i, f := range found {
			if f.Took != time.Duration(i)*time.Second {
				t.Errorf("attestor %d took %v", i, f.Took)
			}
		}
	})
}

// An attestor that ignores its context delays no caller beyond its limit, and the calls that
// it does not return from are bounded.
func TestLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, release := self(t), make(chan struct{})
		var entered atomic.Int32
		slow := attest.Limit(fake{name: "docker", do: func() { entered.Add(1); <-release }}, 5*time.Second)
		call := func(ctx context.Context) (time.Duration, error) {
			start := time.Now()
			found, err := attest.Selectors(ctx, p, []attest.Attestor{fake{name: "unix", selectors: []cache.Selector{{Type: "unix", Value: "uid:1"}}}, slow})
			if err != nil || len(found.Selectors()) != 1 {
				t.Errorf("got %v, %v", found, err)
			}
			return time.Since(start), found[1].Err
		}
		var callers sync.WaitGroup
		for range 100 {
			callers.Go(func() {
				if took, err := call(t.Context()); took != 5*time.Second || err == nil || !strings.Contains(err.Error(), "not answered within 5s") {
					t.Errorf("took %v, %v", took, err)
				}
			})
		}
		callers.Wait()
		if n := entered.Load(); n == 0 || n > 32 {
			t.Errorf("%d calls in flight", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if took, err := call(ctx); took != time.Second || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with a deadline of its own: took %v, %v", took, err)
		}
		close(release)
		synctest.Wait()
		if _, err := call(t.Context()); err != nil {
			t.Errorf("when it answers again: %v", err)
		}
	})
}

func TestFromPIDThatDoesNotExist(t *testing.T) {
	t.Parallel()
	for pid, want := range map[int]string{0: "PID namespace", -1: "PID namespace", 1 << 30: attest.ErrGone.Error()} {
		if _, err := attest.FromPID(pid, 0, 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("PID %d: got %v, want an error with %q", pid, err, want)
		}
	}
}

func TestReadProc(t *testing.T) {
	t.Parallel()
	p, err := attest.FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	want, err := os.ReadFile("/proc/self/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, buf := range [][]byte{nil, make([]byte, 1), make([]byte, 0, 64<<10)} {
		if got, err := p.ReadProc("cmdline", buf, 1<<20); err != nil || !slices.Equal(got, want) {
			t.Errorf("with a buffer of %d bytes: %q, %v", cap(buf), got, err)
		}
		if got, err := p.ReadProc("cmdline", buf, len(want)-1); err == nil {
			t.Errorf("with a buffer of %d bytes: %q is more than the limit", cap(buf), got)
		}
	}
	if exe, _ := os.Executable(); p.Executable() != exe {
		t.Errorf("Executable: %q, want %q", p.Executable(), exe)
	}
}

// The kernel shows the executable of a process through its live threads. The main
// thread may have exited.
func TestExecutableOfEndedMainThread(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd, conn, _ := workload(t, "RENEWD_TEST_MAIN_THREAD=ends")
	p, err := attest.FromConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := os.Readlink(p.Proc("exe")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the main thread has not ended: %v", err)
	}
	if err := p.Alive(); err != nil {
		t.Error(err)
	}
	held, err := p.OpenExecutable()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if got, err := held.Path(); got != exe || err != nil || p.Executable() != exe {
		t.Errorf("got %q, %v and %q, want %q", got, err, p.Executable(), exe)
	}
	cmd.Process.Kill()
	waitGone(t, p)
	if _, err := p.OpenExecutable(); !errors.Is(err, attest.ErrGone) {
		t.Errorf("of a zombie: %v, want ErrGone", err)
	}
	cmd.Wait()
	if _, err := p.OpenExecutable(); !errors.Is(err, attest.ErrGone) {
		t.Errorf("after its end: %v, want ErrGone", err)
	}
}

// Whatever exits while the executable is opened, the result is an executable or an
// error. A process drops its executable shortly before it has exited.
func TestExecutableWhileThreadsEnd(t *testing.T) {
	t.Parallel()
	for range 4 {
		cmd, conn, _ := workload(t, "RENEWD_TEST_MAIN_THREAD=ends")
		p, err := attest.FromConn(conn)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		go func() { cmd.Process.Kill() }()
		for err = nil; !errors.Is(err, attest.ErrGone); {
			var held *attest.Executable
			if held, err = p.OpenExecutable(); err == nil {
				held.Close()
			} else if !errors.Is(err, attest.ErrGone) && !errors.Is(err, os.ErrNotExist) {
				t.Fatalf("got %v, want ErrGone in the end", err)
			}
		}
	}
}
