package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Files of the machine that a container needs besides /usr.
var bootFiles = map[string]string{
	"etc/machine-id":    "0123456789abcdef0123456789abcdef\n", // set, so that this is no first boot
	"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
	"etc/hosts":         "127.0.0.1 localhost server.example.org\n",
	"etc/passwd": `root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
messagebus:x:100:100::/nonexistent:/usr/sbin/nologin
web:x:1001:1001::/:/bin/sh
ops:x:1002:1002::/:/bin/sh
`,
	"etc/group": "root:x:0:\nnobody:x:65534:\nmessagebus:x:100:\nweb:x:1001:\nops:x:1002:\n",
	// Without the random delay of up to a minute.
	"etc/systemd/system/renewd-agent.service.d/test.conf": "[Service]\nEnvironment=RENEWD_RENEWAL_TAINT_DELAY=1s RENEWD_RENEWAL_REFRESH_INTERVAL=1s\n",
	"etc/systemd/system/check.service": `[Unit]
After=basic.target
Wants=basic.target
SuccessAction=exit
FailureAction=exit
FailureActionExitStatus=1

[Service]
Type=oneshot
WorkingDirectory=/src
ExecStart=/bin/bash /src/units.sh
Environment=HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
StandardOutput=file:/out/log
StandardError=inherit
`,
}

// TestBoot boots systemd in a container with this machine's /usr, runs the commands of
// README.md with the units of this directory, and then testdata/units.sh. With SPIRE's
// programs in SPIRE_BIN_DIR that compares a service's selectors with those of spire-agent.
func TestBoot(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("a container with systemd takes root")
	}
	nspawn := tool(t, "systemd-nspawn", "systemd-container")
	tool(t, "systemd-creds", "systemd")
	root := bootRoot(t)
	common := []string{
		"--quiet", "--directory=" + root, "--bind-ro=/usr", "--tmpfs=/usr/local", "--machine=" + fmt.Sprintf("renewd-%d", os.Getpid()),
		"--private-network", "--register=no", "--link-journal=no", "--settings=no", "--console=pipe",
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		common = append(common, "--keep-unit") // nspawn cannot create a scope without systemd
	}
	if out, err := exec.CommandContext(t.Context(), nspawn, append(common, "/usr/bin/true")...).CombinedOutput(); err != nil {
		t.Skipf("no container can be run here: %v\n%s", err, out)
	}
	boot := append(common, "--bind-ro="+programs(t)+":/src/bin", "--bind-ro="+wd(t)+":/src/deploy",
		"--boot", "systemd.unit=check.service")
	if spire := os.Getenv("SPIRE_BIN_DIR"); spire != "" {
		boot = append([]string{"--bind-ro=" + spire + ":/src/spire"}, boot...)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, nspawn, boot...)
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	log, logErr := os.ReadFile(filepath.Join(root, "out", "log"))
	if _, statErr := os.Stat(filepath.Join(root, "out", "began")); statErr != nil {
		t.Skipf("systemd cannot be booted here: %v\n%s%s", err, out, log)
	}
	if err = errors.Join(err, logErr); err != nil {
		t.Errorf("%v\n%s\n%s", err, log, journal(t, root))
	}
}

// bootRoot creates the root directory of a container: links into the mounted /usr, and a few
// files.
func bootRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"usr", "proc", "sys", "dev", "run", "tmp", "root", "out", "src/bin", "src/deploy", "var/log/journal"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		target, err := os.Readlink("/" + dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Skipf("/%s is not a link into /usr here: %v", dir, err)
		}
		if err := os.Symlink(target, filepath.Join(root, dir)); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string]string{
		"src/units.sh":  string(read(t, filepath.Join("testdata", "units.sh"))),
		"src/readme.sh": readme(t),
	}
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		t.Skip(err)
	}
	files["etc/os-release"] = string(release)
	for name, data := range bootFiles {
		files[name] = data
	}
	for name, data := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// readme returns a script of the commands of README.md: the server's, which create the files
// for the agent, then the agent's.
func readme(t *testing.T) string {
	t.Helper()
	blocks := regexp.MustCompile("(?s)```console\n(.*?)```").FindAllSubmatch(read(t, "README.md"), -1)
	if len(blocks) != 2 {
		t.Fatalf("%d blocks of commands in README.md, want the agent's and the server's", len(blocks))
	}
	script := "set -x\nmkdir -p /usr/local/bin\n"
	for _, block := range [][]byte{blocks[1][1], blocks[0][1]} {
		for line := range strings.Lines(string(block)) {
			command, isCommand := strings.CutPrefix(line, "# ")
			if !isCommand {
				t.Fatalf("README.md: %q is not a root command", line)
			}
			script += command
		}
	}
	return script + "set +x\n"
}

// programs builds the three programs.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "../cmd/agent", "../cmd/server", "../cmd/keysetctl")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return dir
}

func wd(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// journal returns the log of the units.
func journal(t *testing.T, root string) []byte {
	t.Helper()
	out, _ := exec.CommandContext(t.Context(), "journalctl", "-D", filepath.Join(root, "var/log/journal"), "-o", "short-precise",
		"-u", "renewd-*", "-u", "check", "--no-pager").CombinedOutput()
	return bytes.TrimSpace(out)
}
