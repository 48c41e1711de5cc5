package unix

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/agent/attest"
)

// TestMain also makes the test binary another process: with RENEWD_TEST_AS=workload
// one that runs without its main thread until its standard input ends; with
// RENEWD_TEST_AS=agent one that attests the process PID,UID,GID in RENEWD_TEST_PEER
// and prints the result.
func TestMain(m *testing.M) {
	switch os.Getenv("RENEWD_TEST_AS") {
	case "":
		os.Exit(m.Run())
	case "workload":
		go func() {
			for {
				if _, err := os.Readlink("/proc/self/exe"); err != nil {
					break
				}
				time.Sleep(time.Millisecond)
			}
			os.Stdout.WriteString("ready\n")
			os.Stdin.Read(make([]byte, 1))
			os.Exit(0)
		}()
		syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0) // only this thread
	case "agent":
		beAgent(os.Getenv("RENEWD_TEST_PEER"))
	}
}

func init() {
	runtime.LockOSThread() // TestMain runs on the main thread
}

func beAgent(peer string) {
	var pid int
	var uid, gid uint32
	if _, err := fmt.Sscanf(peer, "%d,%d,%d", &pid, &uid, &gid); err != nil {
		panic(err)
	}
	p, err := attest.FromPID(pid, uid, gid)
	if err != nil {
		panic(err)
	}
	a := New(Config{SHA256Limit: 1 << 30})
	defer a.Close()
	found, err := attest.Selectors(context.Background(), p, []attest.Attestor{a})
	if err != nil {
		panic(err)
	}
	fmt.Println(found[0].Selectors, found[0].Err)
}

// A process whose main thread has exited (pthread_exit in main, as many daemons do)
// is attested like any other.
func TestMainThreadEnded(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "RENEWD_TEST_AS=workload")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	if _, err := io.ReadFull(stdout, make([]byte, len("ready\n"))); err != nil {
		t.Fatalf("the process does not start: %v", err)
	}
	p, err := attest.FromPID(cmd.Process.Pid, uint32(os.Geteuid()), uint32(os.Getegid()))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	a := New(Config{SHA256Limit: 1 << 30})
	defer a.Close()
	got := strings.Join(values(t, a, p), " ")
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"path:" + exe, fmt.Sprintf("sha256:%x", sha256.Sum256(data))} {
		if !strings.Contains(got, want) {
			t.Errorf("got %s, want %s in it", got, want)
		}
	}
}

// A program may have no file, or a deleted one.
func TestProgramWithoutFile(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(testProgram(t, t.TempDir(), "app"))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.MemfdCreate("app", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	memory := os.NewFile(uintptr(fd), "app")
	defer memory.Close()
	if _, err := memory.Write(data); err != nil {
		t.Fatal(err)
	}
	removed := testProgram(t, t.TempDir(), "removed")
	for name, tt := range map[string]struct {
		p    *attest.Peer
		want string
	}{
		"in memory": {run(t, fmt.Sprintf("/proc/self/fd/%d", fd), nil), "path:/memfd:app"},
		"removed":   {run(t, removed, nil), "path:" + removed},
	} {
		_ = os.Remove(removed)
		a := New(Config{SHA256Limit: 1 << 30})
		got := strings.Join(values(t, a, tt.p), " ")
		a.Close()
		if want := fmt.Sprintf("%s sha256:%x", tt.want, sha256.Sum256(data)); !strings.HasSuffix(got, want) {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

// If the agent may not read something, the error names it and the remedy, so that the
// process does not count as one without such selectors.
func TestUnreadableExecutable(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can start an agent with fewer rights")
	}
	dir, err := os.MkdirTemp("/tmp", "renewd-unix")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	agent, closed := filepath.Join(dir, "agent"), testProgram(t, dir, "closed")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(agent, self, 0o755), os.Chmod(closed, 0o711)); err != nil {
		t.Fatal(err)
	}
	target := run(t, closed, nil)
	for name, tt := range map[string]struct {
		caps         []uintptr
		want, remedy string
	}{
		"no right to look":         {nil, "unix:gid:0", "CAP_SYS_PTRACE"},
		"no right to read":         {[]uintptr{unix.CAP_SYS_PTRACE}, "unix:path:" + closed + "] ", "CAP_DAC_READ_SEARCH"},
		"the rights of the daemon": {[]uintptr{unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH}, "unix:sha256:", "] <nil>"},
	} {
		var out []byte
		err := error(syscall.ETXTBSY)
		// Another test may have forked while the copy was still open for writing.
		for ; errors.Is(err, syscall.ETXTBSY); time.Sleep(10 * time.Millisecond) {
			cmd := exec.Command(agent)
			cmd.Env = append(os.Environ(), "RENEWD_TEST_AS=agent", "RENEWD_TEST_PEER="+strconv.Itoa(target.PID())+",0,0")
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54322}, AmbientCaps: tt.caps}
			out, err = cmd.CombinedOutput()
		}
		if err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		if got := string(out); !strings.Contains(got, tt.want) || !strings.Contains(got, tt.remedy) || !strings.Contains(got, "unix:uid:0") {
			t.Errorf("%s: got %swant uid:0, %s and %s in it", name, got, tt.want, tt.remedy)
		}
	}
}

// The attestation of a process in more than maxGroups groups is incomplete.
func TestProcessInManyGroups(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can start a process in other groups")
	}
	dir, err := os.MkdirTemp("/tmp", "renewd-unix")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	groups := make([]uint32, 65536)
	for i := range groups {
		groups[i] = uint32(4_000_000_000 + i)
	}
	p := run(t, testProgram(t, dir, "app"), &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54322, Groups: groups}})
	got, failure := attestSelf(t, Config{}, p)
	if got != "path" || !says(failure, "supplementary groups") {
		t.Errorf("got %q, %v", got, failure)
	}
}

// Whatever its result, an attestation leaves no open file and no goroutine. The test
// is not parallel, because other tests open files, too.
func TestAttestationsLeakNothing(t *testing.T) {
	dir := t.TempDir()
	app, removed := testProgram(t, dir, "app"), testProgram(t, dir, "removed")
	ended := run(t, app, nil)
	if err := syscall.Kill(ended.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	peers := []*attest.Peer{run(t, app, nil), run(t, removed, nil), ended}
	if err := os.Remove(removed); err != nil {
		t.Fatal(err)
	}
	open := func() int {
		files, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	files, goroutines := open(), runtime.NumGoroutine()
	for _, limit := range []int64{1 << 30, 1} { // 1: too large to hash
		a := New(Config{SHA256Limit: limit})
		for i := range 100 {
			for _, p := range peers {
				for _, ctx := range []context.Context{t.Context(), over} {
					_, _ = attest.Selectors(ctx, p, []attest.Attestor{a})
				}
				_ = p.Executable()
			}
			at := time.Now().Add(time.Duration(i) * time.Second)
			if err := os.Chtimes(app, at, at); err != nil { // it is hashed again
				t.Fatal(err)
			}
		}
		a.Close()
		_, _ = a.Attest(t.Context(), peers[0])
	}
	if n := open(); n != files {
		t.Errorf("%d files are open, before there were %d", n, files)
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines run, before there were %d", n, goroutines)
	}
}
