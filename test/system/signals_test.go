package system_test

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestOutliveTerminal checks that neither program ends when its terminal hangs up, at
// SIGHUP, or when its log has no reader. It reloads its configuration. SIGTERM still
// ends it in good order.
func TestOutliveTerminal(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "rn") // a Unix socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	config := filepath.Join(dir, "server.yaml")
	if err := os.WriteFile(config, []byte("deployments: {default: {listen_address: 127.0.0.1:0}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]struct {
		socket string
		args   []string
	}{
		"server": {"admin.sock", []string{"-config", config, "-data-dir", dir + "/s", "-key-file", key(t, dir), "-admin-socket", dir + "/admin.sock", "-bundle-endpoint-address", ""}},
		"agent": {"agent.sock", []string{"-server-address", "127.0.0.1:1", "-insecure-bootstrap", "-join-token-file", dir + "/none",
			"-data-dir", dir + "/a", "-socket-path", dir + "/agent.sock"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			outlive(t, filepath.Join(dir, p.socket), append([]string{name, "run", "-trust-domain", "example.org", "-metrics-address", ""}, p.args...))
		})
	}
}

// outlive runs a daemon that listens on socket, and closes its terminal.
func outlive(t *testing.T, socket string, args []string) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.CommandContext(t.Context(), filepath.Join(programs(), args[0]), args[1:]...)
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	listens := func() bool {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	}
	for deadline := time.Now().Add(2 * time.Minute); !listens(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the daemon does not listen within two minutes")
		}
	}
	send := func(s syscall.Signal) {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}

	if err := r.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	send(syscall.SIGHUP)
	log, said := bufio.NewScanner(r), false
	for !said && log.Scan() {
		said = strings.Contains(log.Text(), `"level":"INFO","msg":"configuration reloaded","changed_fields":[]`)
	}
	if !said {
		_ = cmd.Process.Kill()
		t.Fatalf("the reload is not logged, and the program ended: %v", <-ended)
	}
	_ = r.Close()
	send(syscall.SIGHUP) // is logged, without a reader
	send(syscall.SIGTERM)
	if err := <-ended; err != nil {
		t.Errorf("the daemon ended with %v", err)
	}
}
