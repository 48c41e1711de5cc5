package figures

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// kind is a daemon that can be measured.
type kind struct {
	name   string
	binary func(b *testing.B) string
	// command returns arguments and environment for a cache of that many SVIDs.
	command func(w *world, token, socket string, cached int) (args, env []string)
}

var renewd = kind{"renewd", build, func(w *world, token, socket string, cached int) ([]string, []string) {
	args := []string{
		"run", "-trust-domain", td.Name(), "-server-address", w.address,
		"-trust-bundle-file", w.file("bundle.pem", w.server.BundlePEM()), "-data-dir", filepath.Join(w.dir, "data"),
		"-socket-path", socket, "-svid-cache-size", strconv.Itoa(cached), "-metrics-address", "127.0.0.1:0",
		// Without the random delay, which is not to be measured.
		"-renewal-taint-delay", "0s",
	}
	if w.kubelet != 0 {
		args = append(args, "-workload-attestation-kubernetes-enabled", "-workload-attestation-kubernetes-kubelet-read-only-port", strconv.Itoa(w.kubelet))
	}
	return args, []string{"RENEWD_JOIN_TOKEN=" + token}
}}

var spireAgent = kind{"spire-agent", func(*testing.B) string {
	return filepath.Join(os.Getenv("SPIRE_BIN_DIR"), "spire-agent")
}, func(w *world, token, socket string, cached int) ([]string, []string) {
	host, port, _ := net.SplitHostPort(w.address)
	kubernetes := ""
	if w.kubelet != 0 {
		kubernetes = fmt.Sprintf(`  WorkloadAttestor "k8s" { plugin_data { kubelet_read_only_port = %d } }`, w.kubelet)
	}
	config := fmt.Sprintf(`
agent {
  data_dir = %q
  server_address = %q
  server_port = %q
  socket_path = %q
  trust_domain = %q
  trust_bundle_path = %q
  join_token = %q
  x509_svid_cache_max_size = %d
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "disk" { plugin_data { directory = %q } }
  WorkloadAttestor "unix" { plugin_data {} }
%s
}
`, w.dir, host, port, socket, td.Name(), w.file("bundle.pem", w.server.BundlePEM()), token, cached, w.dir, kubernetes)
	return []string{"run", "-config", w.file("agent.conf", []byte(config))}, nil
}}

// each runs a benchmark for every daemon that is installed.
func each(b *testing.B, run func(b *testing.B, k kind)) {
	b.Helper()
	kinds := []kind{renewd}
	if os.Getenv("SPIRE_BIN_DIR") != "" {
		kinds = append(kinds, spireAgent)
	}
	for _, k := range kinds {
		b.Run(k.name, func(b *testing.B) {
			for b.Loop() {
				run(b, k)
			}
			b.ReportMetric(0, "ns/op") // mostly waiting
		})
	}
}

// daemon is a running daemon.
type daemon struct {
	b      *testing.B
	pid    int
	socket string
	run    func() // starts it again after stop
	stop   func()
}

func (w *world) start(k kind, cached int) *daemon {
	w.b.Helper()
	token, err := w.server.CreateJoinToken(context.Background(), time.Hour, "")
	if err != nil {
		w.b.Fatal(err)
	}
	d := &daemon{b: w.b, socket: filepath.Join(w.dir, "agent.sock")}
	binary := k.binary(w.b)
	args, env := k.command(w, token.Value, d.socket, cached)
	log, err := os.Create(filepath.Join(w.dir, "agent.log"))
	if err != nil {
		w.b.Fatal(err)
	}
	d.run = func() {
		cmd := exec.Command(binary, args...)
		cmd.Env = append(os.Environ(), env...)
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			w.b.Fatal(err)
		}
		d.pid = cmd.Process.Pid
		d.stop = sync.OnceFunc(func() {
			cmd.Process.Signal(syscall.SIGTERM)
			kill := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
			defer kill.Stop()
			cmd.Wait()
		})
	}
	d.run()
	w.b.Cleanup(func() {
		d.stop()
		if w.b.Failed() {
			text, _ := os.ReadFile(log.Name())
			w.b.Logf("the log ends with:\n%s", text[max(0, len(text)-4000):])
		}
		log.Close()
	})
	return d
}

// answers waits until a caller is served and returns the time.
func (d *daemon) answers(limit time.Duration) time.Time {
	d.b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for {
		err := once(ctx, d.socket)
		if err == nil {
			return time.Now()
		}
		if ctx.Err() != nil {
			d.b.Fatalf("no answer within %v: %v", limit, err)
		}
		time.Sleep(time.Millisecond)
	}
}

// cpu returns the processor time used so far.
func (d *daemon) cpu() time.Duration {
	d.b.Helper()
	var t unix.Timespec
	// MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of the kernel.
	if err := unix.ClockGettime(int32(^d.pid<<3|2), &t); err != nil {
		d.b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

// memory returns a field of /proc/PID/status in bytes.
func (d *daemon) memory(field string) float64 {
	d.b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.pid))
	if err != nil {
		d.b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			kb, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				d.b.Fatal(err)
			}
			return float64(kb) * 1024
		}
	}
	d.b.Fatalf("no %s", field)
	return 0
}

// client is a process of callers; see runClient.
type client struct {
	b    *testing.B
	what string // its kind
	in   io.WriteCloser
	out  io.Reader
	end  func()
}

// startClient starts a client as the user uid, or as this user when uid is negative.
func startClient(b *testing.B, binary string, uid int, spec string, args ...any) *client {
	b.Helper()
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), clientEnv+"="+fmt.Sprintf(spec, args...))
	cmd.Stderr = os.Stderr
	if uid >= 0 {
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	c := &client{b: b, what: fmt.Sprintf(spec, args...), in: in, out: out, end: sync.OnceFunc(func() {
		in.Close()
		kill := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		defer kill.Stop()
		cmd.Wait()
	})}
	b.Cleanup(c.end)
	return c
}

func (c *client) tell(line string) { fmt.Fprintln(c.in, line) }

// readWord returns the next word of the client. The client ends with an error after
// clientTimeout; the wait here is a minute longer.
func (c *client) readWord() string {
	c.b.Helper()
	if err := c.out.(interface{ SetReadDeadline(time.Time) error }).SetReadDeadline(time.Now().Add(clientTimeout + time.Minute)); err != nil {
		c.b.Fatal(err)
	}
	var s string
	if _, err := fmt.Fscan(c.out, &s); err != nil {
		c.b.Fatalf("client %q: waiting for its next word: %v", c.what, err)
	}
	return s
}

func (c *client) hearNumber() float64 {
	c.b.Helper()
	v, err := strconv.ParseFloat(c.readWord(), 64)
	if err != nil {
		c.b.Fatal(err)
	}
	return v
}

var built struct {
	sync.Once
	dir, path string
	err       error
}

// build builds the binary as it is released.
func build(b *testing.B) string {
	b.Helper()
	built.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "figures"); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "agent")
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", built.path, "github.com/renewd/renewd/cmd/agent")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("%w\n%s", err, out)
		}
	})
	if built.err != nil {
		b.Fatal(built.err)
	}
	return built.path
}

// copySelf copies this program to a place where every user can run it.
func (w *world) copySelf() string {
	w.b.Helper()
	in, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		w.b.Fatal(err)
	}
	path := w.file("client", in)
	if err := os.Chmod(path, 0o755); err != nil {
		w.b.Fatal(err)
	}
	return path
}
