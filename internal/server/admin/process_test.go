package admin_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/socket"
)

// TestMain lets the test binary run as another process: an operator at the socket in
// RENEWD_TEST_SOCKET, which prints the results of a read and of a change, or a server that
// parses the rule in RENEWD_TEST_RULE.
func TestMain(m *testing.M) {
	if rule, ok := os.LookupEnv("RENEWD_TEST_RULE"); ok {
		tryRule(rule)
		return
	}
	path := os.Getenv("RENEWD_TEST_SOCKET")
	if path == "" {
		os.Exit(m.Run())
	}
	read, change := try(path)
	if status.Code(read) == codes.Unavailable {
		fmt.Print(read)
		return
	}
	fmt.Printf("%v %v", status.Code(read), status.Code(change))
}

// try makes a read-only and a mutating call as this process.
func try(path string) (read, change error) {
	c, err := renewd.DialSocket(path)
	if err != nil {
		panic(err)
	}
	defer c.Close()
	_, read = c.ListKeysets(context.Background(), &api.ListKeysetsRequest{})
	_, change = c.PrepareKeyset(context.Background(), &api.PrepareKeysetRequest{})
	return read, change
}

// serveUnix serves on a listener until the test ends.
func serveUnix(t testing.TB, w *world, lis net.Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.ServeUnix(ctx, lis) }()
	t.Cleanup(func() {
		cancel()
		check(t, <-done)
	})
}

func adminSocket(t testing.TB, w *world) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "admin.sock")
	lis, err := socket.Listen(path, 0o660)
	check(t, err)
	serveUnix(t, w, lis)
	return path
}

// TestProcesses: the rules decide what a process at the admin socket may do.
func TestProcesses(t *testing.T) {
	t.Parallel()
	me, err := user.Current()
	check(t, err)
	group, err := user.LookupGroupId(strconv.Itoa(os.Getegid()))
	check(t, err)
	uid, gid := fmt.Sprintf("unix:uid:%d", os.Geteuid()), fmt.Sprintf("unix:gid:%d", os.Getegid())
	const other = "unix:uid:4242"
	for name, c := range map[string]struct {
		managers, readers []string
		read, change      codes.Code
	}{
		"no rules":             {nil, nil, codes.OK, codes.OK},
		"others only":          {[]string{other, "unix:gid:4242", boss.String()}, []string{other}, codes.PermissionDenied, codes.PermissionDenied},
		"managers by uid":      {[]string{other, uid}, nil, codes.OK, codes.OK},
		"managers by user":     {[]string{"unix:user:" + me.Username}, nil, codes.OK, codes.OK},
		"managers by gid":      {[]string{gid}, nil, codes.OK, codes.OK},
		"managers by group":    {[]string{"unix:group:" + group.Name}, nil, codes.OK, codes.OK},
		"readers by uid":       {[]string{other}, []string{uid}, codes.OK, codes.PermissionDenied},
		"readers by group":     {nil, []string{"unix:group:" + group.Name}, codes.OK, codes.PermissionDenied},
		"both":                 {[]string{uid}, []string{uid}, codes.OK, codes.OK},
		"readers, no managers": {nil, []string{uid}, codes.OK, codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorldFor(t, c.managers, c.readers)
			if read, change := try(adminSocket(t, w)); status.Code(read) != c.read || status.Code(change) != c.change {
				t.Errorf("read %v, change %v, want %v and %v", read, change, c.read, c.change)
			}
			want := 1 // the first keyset
			if c.change == codes.OK {
				want = 2
			}
			log := w.only().storage.records()
			if len(log) != want {
				t.Fatalf("the audit log has %d records, want %d", len(log), want)
			}
			if actor := log[want-1].Actor; want == 2 && actor != uid {
				t.Errorf("audit log: %q", actor)
			}
		})
	}
}

// TestOtherProcesses: user and groups are those of the process, not of its user's account.
func TestOtherProcesses(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to choose user and groups")
	}
	listen := func(managers, readers []string) (*world, string) {
		w := newWorldFor(t, managers, readers)
		dir := t.TempDir()
		check(t, os.Chmod(dir, 0o755))
		check(t, os.Chmod(filepath.Dir(dir), 0o755))
		path := filepath.Join(dir, "admin.sock")
		lis, err := socket.Listen(path, 0o666)
		check(t, err)
		serveUnix(t, w, lis)
		return w, path
	}
	silent, unconfigured := listen(nil, nil)
	w, path := listen([]string{"unix:gid:4711", "unix:uid:4242"}, []string{"unix:gid:4712", "unix:uid:4243"})
	many := []uint32{4711}
	for gid := range uint32(200) {
		many = append(many, 5000+gid)
	}
	const nothing, read, all = "PermissionDenied PermissionDenied", "OK PermissionDenied", "OK OK"
	for _, c := range []struct {
		name     string
		uid, gid uint32
		groups   []uint32
		want     string
	}{
		{"root", 0, 0, nil, nothing},
		{"a manager", 4242, 1, nil, all},
		{"a reader", 4243, 1, nil, read},
		{"a user whose number is a manager group's", 4711, 1, nil, nothing},
		{"a manager's group", 0, 0, []uint32{7, 4711, 9}, all},
		{"a reader's group", 0, 0, []uint32{4712}, read},
		{"a reader in a manager's group", 4243, 1, []uint32{4711}, all},
		{"more groups than usual", 0, 0, many, all},
		{"more groups, and not that one", 0, 0, many[1:], nothing},
		{"the primary group", 0, 4711, nil, all},
		{"the primary group, of a reader", 0, 4712, []uint32{1}, read},
	} {
		t.Run(c.name, func(t *testing.T) {
			who := &syscall.Credential{Uid: c.uid, Gid: c.gid, Groups: c.groups}
			if got := runAs(t, path, who); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			log := w.only().storage.records()
			if got, want := log[len(log)-1].Actor, fmt.Sprintf("unix:uid:%d", c.uid); c.want == all && got != want {
				t.Errorf("audit log: %q, want %q", got, want)
			}
		})
	}
	if got := runAs(t, unconfigured, &syscall.Credential{Uid: 4242}); got != nothing || len(silent.only().storage.records()) != 1 {
		t.Errorf("without any rule user 4242 got %s", got)
	}
	check(t, os.Chmod(path, 0o660))
	if got := runAs(t, path, &syscall.Credential{Uid: 4242, Gid: 1}); !strings.Contains(got, "admin_socket_mode: 0666") {
		t.Errorf("a manager without access to the socket got %s", got)
	}
}

// runAs returns the results of a read and of a change by another process.
func runAs(t *testing.T, path string, who *syscall.Credential) string {
	t.Helper()
	// A link, because other users cannot read the directory of the test binary.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "RENEWD_TEST_SOCKET="+path, "GORACE=atexit_sleep_ms=0")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	return string(out)
}

// TestCallerThatCannotBeIdentified: the caller is rejected, and does not count as user 0.
func TestCallerThatCannotBeIdentified(t *testing.T) {
	t.Parallel()
	lis, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	check(t, err)
	defer lis.Close()
	conn, err := net.Dial("unix", lis.Addr().String())
	check(t, err)
	check(t, conn.Close())
	if err := admin.Identify(conn); err == nil {
		t.Error("no error")
	}
}

// TestSocketInWritableDirectory: ServeUnix fails if all users can replace the socket.
func TestSocketInWritableDirectory(t *testing.T) {
	t.Parallel()
	w := newWorldFor(t, nil, nil)
	dir := filepath.Join(t.TempDir(), "open")
	check(t, os.Mkdir(dir, 0o755))
	check(t, os.Chmod(dir, 0o777|os.ModeSticky))
	lis, err := socket.Listen(filepath.Join(dir, "s"), 0o660)
	check(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = w.ServeUnix(ctx, lis)
	if err == nil || !strings.Contains(err.Error(), "chmod o-w "+dir) {
		t.Errorf("got %v", err)
	}
	if _, err := net.Dial("unix", filepath.Join(dir, "s")); err == nil {
		t.Error("the listener is open")
	}
}
