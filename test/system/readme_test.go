package system_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
)

// TestReadme runs the commands of README's "Run it" in a shell. At the end the reader has
// an SVID, and the programs listen on the loopback interface only.
func TestReadme(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)\n## Run it\n.*?\n```sh\n(.*?)\n```\n").FindSubmatch(readme)
	if block == nil {
		t.Fatal("README.md has no block of commands under Run it")
	}
	// A Unix socket's path has at most 107 bytes.
	dir, err := os.MkdirTemp("", "rn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Symlink(programs(), filepath.Join(dir, "bin")); err != nil {
		t.Fatal(err)
	}
	ownLoopback(t)
	// The binaries that make would build.
	script := "make() { [ \"$*\" = build ]; }\n" + string(block[1]) + "\necho exit $?\ncat /proc/net/tcp /proc/net/tcp6 > try/listening\nkill %bin/server %bin/agent\nwait\n"
	cmd := exec.CommandContext(t.Context(), "bash", "-mc", script)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	log := func(name string) string {
		text, _ := os.ReadFile(filepath.Join(dir, "try", name))
		return string(text)
	}
	if err != nil || !strings.Contains(string(out), "spiffe://example.org/me") || !strings.Contains(string(out), "\nexit 0\n") {
		t.Fatalf("%v\n%s\nserver:\n%s\nagent:\n%s", err, out, log("server.log"), log("agent.log"))
	}
	svid, err := x509svid.Load(filepath.Join(dir, "try", "svid", "svid.0.pem"), filepath.Join(dir, "try", "svid", "svid.0.key"))
	if err != nil || svid.ID.String() != "spiffe://example.org/me" {
		t.Errorf("the SVID: %v, %v", svid, err)
	}
	// 0A: it listens; the port is in hexadecimal.
	listening := regexp.MustCompile(`(?m)^ *\d+: ([0-9A-F]+):(1F91|2382|2383) [0-9A-F:]+ 0A `).FindAllStringSubmatch(log("listening"), -1)
	if len(listening) != 3 {
		t.Errorf("%d listeners %q, want those that README.md names\n%s", len(listening), listening, log("listening"))
	}
	for _, l := range listening {
		if l[1] != "0100007F" {
			t.Errorf("not on loopback alone: %q", l[0])
		}
	}
}

// ownLoopback gives the processes of this goroutine a separate loopback interface, because
// the ports are fixed. If it cannot, it skips the test unless the ports are free.
func ownLoopback(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if unix.Unshare(unix.CLONE_NEWNET) == nil {
		if err := loopbackUp(); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, port := range []int{8081, 9090, 9091} {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Skipf("README.md's ports are not free, and only root can have others of the same number: %v", err)
		}
		_ = l.Close()
	}
}

// loopbackUp starts the loopback interface of a new network.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	request, err := unix.NewIfreq("lo")
	if err == nil {
		request.SetUint16(unix.IFF_UP)
		err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
	}
	return errors.Join(err, unix.Close(fd))
}
