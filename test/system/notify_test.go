package system_test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Both programs notify a service manager when they accept connections, and not before:
// units that are ordered after them can then connect.
func TestNotify(t *testing.T) {
	t.Parallel()
	free, err := ports(1)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "rn") // a Unix socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	config := filepath.Join(dir, "server.yaml")
	if err := os.WriteFile(config, []byte("deployments: {default: {listen_address: 127.0.0.1:0}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := manage(t, dir, "server", "run", "-config", config, "-trust-domain", "example.org", "-data-dir", dir+"/s", "-key-file", key(t, dir),
		"-admin-socket", dir+"/admin.sock", "-bundle-endpoint-address", "", "-metrics-address", "127.0.0.1:"+free[0])
	if said := server.wait(); said != "READY=1" {
		t.Fatalf("the server said %q; its log:\n%s", said, server.log())
	}
	if conn, err := net.Dial("unix", dir+"/admin.sock"); err != nil {
		t.Error(err)
	} else {
		_ = conn.Close()
	}

	agent := []string{"agent", "run", "-trust-domain", "example.org", "-server-address", "127.0.0.1:1", "-insecure-bootstrap",
		"-join-token-file", dir + "/none", "-data-dir", dir + "/a", "-socket-path", dir + "/agent.sock", "-metrics-address"}
	// The server has the address, so this one ends without READY.
	taken := manage(t, dir, append(agent, "127.0.0.1:"+free[0])...)
	if said := taken.wait(); said != "ended" || !strings.Contains(taken.log(), "address already in use") {
		t.Errorf("an agent whose address is in use said %q; its log:\n%s", said, taken.log())
	}
	// This one is ready although its server does not answer.
	alone := manage(t, dir, append(agent, "127.0.0.1:0")...)
	if said := alone.wait(); said != "READY=1" {
		t.Errorf("the agent said %q; its log:\n%s", said, alone.log())
	}
	if conn, err := net.Dial("unix", dir+"/agent.sock"); err != nil {
		t.Error(err)
	} else {
		_ = conn.Close()
	}
}

func key(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "store.key")
	if out, err := exec.Command(filepath.Join(programs(), "server"), "key", "new", path).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// managed is a process under a service manager.
type managed struct {
	conn   *net.UnixConn
	ended  chan struct{}
	stderr bytes.Buffer // read it after ended
	stop   func()
}

func manage(t *testing.T, dir string, args ...string) *managed {
	t.Helper()
	name := filepath.Join(dir, "notify")
	_ = os.Remove(name)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	m := &managed{conn: conn, ended: make(chan struct{})}
	cmd := exec.Command(filepath.Join(programs(), args[0]), args[1:]...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+name)
	cmd.Stderr = &m.stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		_ = conn.SetReadDeadline(time.Now())
		close(m.ended)
	}()
	m.stop = func() {
		_ = cmd.Process.Kill()
		<-m.ended
	}
	t.Cleanup(func() {
		m.stop()
		_ = conn.Close()
	})
	return m
}

// wait returns the first notification of the process, or "ended" if it ends without one.
func (m *managed) wait() string {
	buf := make([]byte, 64)
	n, err := m.conn.Read(buf)
	if err != nil {
		return "ended"
	}
	return string(buf[:n])
}

// log ends the process and returns its log.
func (m *managed) log() string {
	m.stop()
	return m.stderr.String()
}
