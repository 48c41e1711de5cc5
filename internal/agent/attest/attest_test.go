package attest_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
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
	res, err := attest.Selectors(t.Context(), p, []attest.Attestor{someone})
	if !errors.Is(err, attest.ErrGone) || len(res.Selectors) != 0 {
		t.Errorf("got %v, %v, want ErrGone", res.Selectors, err)
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
		partial   bool
		fails     bool
	}{
		"all answer":            {[]attest.Attestor{one, two}, []cache.Selector{a, b}, false, false},
		"one fails":             {[]attest.Attestor{broken, one, two}, []cache.Selector{a, b}, true, false},
		"all fail":              {[]attest.Attestor{broken, broken}, nil, false, true},
		"one fails, none gives": {[]attest.Attestor{broken, fake{name: "unix"}}, nil, false, true},
		"one fails in part":     {[]attest.Attestor{fake{name: "k8s", selectors: []cache.Selector{b}, err: broken.err}, one}, []cache.Selector{b, a}, true, false},
		"all fail in part":      {[]attest.Attestor{fake{name: "k8s", selectors: []cache.Selector{b}, err: broken.err}}, []cache.Selector{b}, true, false},
		"nothing to say":        {[]attest.Attestor{fake{name: "unix"}}, nil, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := attest.FromPID(os.Getpid(), 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			res, err := attest.Selectors(t.Context(), p, tt.attestors)
			if (err != nil) != tt.fails || (res.Partial != nil) != tt.partial || !slices.Equal(res.Selectors, tt.want) {
				t.Errorf("got %v, partial %v, error %v", res.Selectors, res.Partial, err)
			}
			if failure := errors.Join(err, res.Partial); failure != nil && !strings.Contains(failure.Error(), "attestor k8s: kubelet is down") {
				t.Errorf("the error does not name the attestor: %v", failure)
			}
		})
	}
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
