package system_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// A container of a real Docker Engine: its selectors, beside those that spire-agent finds
// for the same process, and what happens while the engine is down.
func TestDockerBesideSPIRE(t *testing.T) {
	t.Parallel()
	env := withSPIRE(t)
	env["DOCKER_HOST"] = "unix://" + dockerEngine(t)
	env["USR"] = "/usr" // the container's programs are the machine's
	run(t, "spire-docker.txtar", env)
}

// dockerEngine starts a Docker Engine of its own and returns the path of its socket.
func dockerEngine(t *testing.T) string {
	t.Helper()
	program, err := exec.LookPath("dockerd")
	if err != nil || os.Getuid() != 0 {
		t.Skip("install Docker Engine (Debian package docker.io) and run this as root")
	}
	if _, err := exec.LookPath("docker"); err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "dk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	var out bytes.Buffer
	engine := exec.Command(program, "--storage-driver=vfs", "--iptables=false", "--bridge=none", "--data-root="+dir+"/data",
		"--exec-root="+dir+"/exec", "--pidfile="+dir+"/pid", "--host=unix://"+socket)
	engine.Stdout, engine.Stderr = &out, &out
	if err := engine.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = engine.Wait() }()
	t.Cleanup(func() {
		_ = engine.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			_ = engine.Process.Kill()
			<-ended
		}
	})
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if exec.CommandContext(t.Context(), "docker", "--host", "unix://"+socket, "version").Run() == nil {
			return socket
		}
		select {
		case <-ended:
			t.Skipf("Docker Engine does not run here:\n%s", &out)
		default:
		}
	}
	t.Skipf("Docker Engine does not answer here:\n%s", &out)
	return ""
}
