package unix

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/selector"
)

// testProgram copies the program "sleep" so that it can be changed.
func testProgram(t *testing.T, dir, name string) string {
	t.Helper()
	from, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("no sleep here:", err)
	}
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func run(t *testing.T, path string, attr *syscall.SysProcAttr) *attest.Peer {
	t.Helper()
	var cmd *exec.Cmd
	// Another test may have forked while the copy was still open for writing.
	for range 100 {
		cmd = exec.Command(path, "60")
		cmd.SysProcAttr = attr
		if err := cmd.Start(); !errors.Is(err, syscall.ETXTBSY) {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	uid, gid := uint32(os.Geteuid()), uint32(os.Getegid())
	if attr != nil && attr.Credential != nil {
		uid, gid = attr.Credential.Uid, attr.Credential.Gid
	}
	p, err := attest.FromPID(cmd.Process.Pid, uid, gid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(); cmd.Process.Kill(); cmd.Wait() })
	return p
}

func values(t *testing.T, a *Attestor, p *attest.Peer) []string {
	t.Helper()
	selectors, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, s := range selectors {
		if s.Type != "unix" {
			t.Errorf("selector %s has another type", s)
		}
		out = append(out, s.Value)
	}
	return out
}

func with(values []string, prefix string) []string {
	return slices.DeleteFunc(slices.Clone(values), func(v string) bool { return !strings.HasPrefix(v, prefix) })
}

func TestSelectors(t *testing.T) {
	t.Parallel()
	path := testProgram(t, t.TempDir(), "app (1) x")
	p := run(t, path, nil)
	got := values(t, New(Config{SHA256Limit: 1 << 30}), p)

	uid, gid := strconv.Itoa(os.Geteuid()), strconv.Itoa(os.Getegid())
	want := []string{"uid:" + uid, "gid:" + gid, "path:" + path}
	if u, err := user.LookupId(uid); err == nil {
		want = append(want, "user:"+u.Username)
	}
	if g, err := user.LookupGroupId(gid); err == nil {
		want = append(want, "group:"+g.Name)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range groups {
		want = append(want, fmt.Sprintf("supplementary_gid:%d", id))
		if g, err := user.LookupGroupId(strconv.Itoa(id)); err == nil {
			want = append(want, "supplementary_group:"+g.Name)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, fmt.Sprintf("sha256:%x", sha256.Sum256(data)))
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestSelectorsAreListed: the selectors that this attestor gives are those of the list. The
// process that runs the test may have no name and no supplementary group.
func TestSelectorsAreListed(t *testing.T) {
	t.Parallel()
	a := New(Config{SHA256Limit: 1 << 30})
	var given []string
	for _, value := range values(t, a, run(t, testProgram(t, t.TempDir(), "app"), nil)) {
		given = append(given, "unix:"+value)
	}
	for _, n := range []*names{a.users, a.groups, a.supplementary} {
		given = append(given, "unix:"+n.idPrefix+"0", "unix:"+n.namePrefix+"x")
	}
	if err := selector.Compare("unix", given); err != nil {
		t.Error(err)
	}
}

func TestSelectorsOfAnotherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can start a process as another user")
	}
	dir, err := os.MkdirTemp("/tmp", "renewd-unix")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p := run(t, testProgram(t, dir, "app"), &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: 54321, Gid: 54322, Groups: []uint32{0, 54323}},
	})
	got := values(t, New(Config{SkipPath: true}), p)
	want := []string{"uid:54321", "gid:54322", "supplementary_gid:0", "supplementary_group:root", "supplementary_gid:54323"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A process may connect, leave the connection to a child and execute another user's
// set-user-ID program. It then runs as another user than it connected as.
func TestProcessThatChangedItsUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can start a process as another user")
	}
	for name, mode := range map[string]os.FileMode{"user": os.ModeSetuid, "group": os.ModeSetgid} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("/tmp", "renewd-unix")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			path := testProgram(t, dir, "app")
			if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o755|mode)); err != nil {
				t.Fatal(err)
			}
			p := run(t, path, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54322}})
			// Start returns when execve closes files, and the credentials change
			// a moment later.
			line := map[string]string{"user": "Uid:\t54321\t54321", "group": "Gid:\t54322\t54322"}[name]
			for started := time.Now(); time.Since(started) < time.Minute; time.Sleep(time.Millisecond) {
				status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(string(status), line) {
					break
				}
			}
			got, err := New(Config{}).Attest(t.Context(), p)
			if err == nil {
				t.Fatalf("got %q, want an error", got)
			}
			if !strings.Contains(err.Error(), "54321") || !strings.Contains(err.Error(), "connect") {
				t.Errorf("%q names neither the user nor a remedy", err)
			}
		})
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	p := run(t, testProgram(t, t.TempDir(), "app"), nil)
	notNeeded, needed := func() bool { return false }, func() bool { return true }
	for name, tt := range map[string]struct {
		cfg     Config
		want    string // of path and sha256
		missing string
	}{
		"default":             {Config{}, "path", ""},
		"no path":             {Config{SkipPath: true}, "", ""},
		"hash":                {Config{SHA256Limit: 1 << 30}, "path sha256", ""},
		"hash without path":   {Config{SHA256Limit: 1 << 30, SkipPath: true}, "sha256", ""},
		"hash, needed":        {Config{SHA256Limit: 1 << 30, SHA256Needed: needed}, "path sha256", ""},
		"hash, not needed":    {Config{SHA256Limit: 1 << 30, SHA256Needed: notNeeded}, "path", ""},
		"hash, limited":       {Config{SHA256Limit: 10}, "path", "unix.sha256_size_limit is 10"},
		"limited, not needed": {Config{SHA256Limit: 10, SHA256Needed: notNeeded}, "path", ""},
	} {
		got, failure := attestSelf(t, tt.cfg, p)
		if got != tt.want || !says(failure, tt.missing) {
			t.Errorf("%s: got %q, %v; want %q, %q", name, got, failure, tt.want, tt.missing)
		}
	}
}

// attestSelf returns which selectors of the executable were found, and checks that
// the user's selector is always there.
func attestSelf(t *testing.T, cfg Config, p *attest.Peer) (kinds string, err error) {
	t.Helper()
	a := New(cfg)
	defer a.Close()
	selectors, err := a.Attest(t.Context(), p)
	var got []string
	for _, s := range selectors {
		if kind, _, _ := strings.Cut(s.Value, ":"); kind == "path" || kind == "sha256" {
			got = append(got, kind)
		}
	}
	if uid := fmt.Sprintf("unix:uid:%d", p.UID()); !strings.Contains(fmt.Sprint(selectors), uid) {
		t.Errorf("got %v without %s", selectors, uid)
	}
	return strings.Join(got, " "), err
}

// says reports whether err contains text, or is nil if text is empty.
func says(err error, text string) bool {
	if text == "" {
		return err == nil
	}
	return err != nil && strings.Contains(err.Error(), text)
}

// A package upgrade replaces the file of a running program. The process keeps the
// selectors of the path and of the old content.
func TestProgramReplacedWhileItRuns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := testProgram(t, dir, "app")
	p := run(t, path, nil)
	a := New(Config{SHA256Limit: 1 << 30})
	before := values(t, a, p)
	if err := os.WriteFile(path+".new", []byte("another program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	for name, a := range map[string]*Attestor{"same attestor": a, "new attestor": New(Config{SHA256Limit: 1 << 30})} {
		if after := values(t, a, p); !slices.Equal(before, after) {
			t.Errorf("%s:\nbefore %q\nafter  %q", name, before, after)
		}
	}
}

func TestProgramCalledDeleted(t *testing.T) {
	t.Parallel()
	path := testProgram(t, t.TempDir(), "app (deleted)")
	got := values(t, New(Config{}), run(t, path, nil))
	if want := []string{"path:" + path}; !slices.Equal(with(got, "path:"), want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestEndedProcess(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := attest.FromPID(cmd.Process.Pid, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	cmd.Process.Kill()
	cmd.Wait()
	if _, err := attest.Selectors(t.Context(), p, []attest.Attestor{New(Config{})}); !errors.Is(err, attest.ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		var fail error
		n := newNames("uid:", "user:", func(id string) (string, error) {
			asked++
			if id == "7" {
				return "", nil // has no name
			}
			return "name" + id, fail
		})
		get := func(id uint32) string {
			var f findings
			n.add(&f, id)
			return strings.TrimSuffix(fmt.Sprint(f.selectors, " ", errors.Join(f.failures...)), " <nil>")
		}
		if got := get(5); got != "[unix:uid:5 unix:user:name5]" {
			t.Errorf("got %s", got)
		}
		if got := get(7); got != "[unix:uid:7]" {
			t.Errorf("without a name: got %s", got)
		}
		time.Sleep(namesTTL - time.Second)
		get(5)
		get(7)
		if asked != 2 {
			t.Errorf("asked %d times, want 2", asked)
		}
		fail = errors.New("directory is down")
		time.Sleep(2 * time.Second)
		if got := get(5); got != "[unix:uid:5 unix:user:name5]" {
			t.Errorf("while the directory is down: got %s", got)
		}
		if got := get(6); got != "[unix:uid:6] name of uid:6: directory is down" {
			t.Errorf("unknown while the directory is down: got %s", got)
		}
		fail = nil
		for id := range uint32(3 * maxNames) {
			get(id)
		}
		if len(n.cached) > maxNames {
			t.Errorf("%d names kept", len(n.cached))
		}
	})
}

// Without a user database, as in an image with only the agent, no ID has a name; that
// is not a failure. (A build without cgo gets the file's error.)
func TestNoUserDatabase(t *testing.T) {
	t.Parallel()
	missing := &fs.PathError{Op: "open", Path: "/etc/passwd", Err: syscall.ENOENT}
	denied := &fs.PathError{Op: "open", Path: "/etc/passwd", Err: syscall.EACCES}
	for _, err := range []error{missing, user.UnknownUserIdError(1), user.UnknownGroupIdError("1")} {
		if got := ignoreUnknownID(err); got != nil {
			t.Errorf("%v: %v, want nil", err, got)
		}
	}
	if got := ignoreUnknownID(denied); got == nil {
		t.Errorf("%v: nil, want the error", denied)
	}
	for name, lookup := range map[string]func(string) (string, error){"user": lookupUser, "group": lookupGroup} {
		if got, err := lookup("4000000001"); got != "" || err != nil {
			t.Errorf("%s without a name: %q, %v", name, got, err)
		}
	}
}

func TestParseStatus(t *testing.T) {
	t.Parallel()
	ids := "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n"
	for name, tt := range map[string]struct {
		text string
		want status
		ok   bool
	}{
		"effective IDs":          {"Name:\tx\n" + ids + "Groups:\t9 10 \n", status{2, 6, []uint32{9, 10}, false}, true},
		"no groups":              {ids + "Groups:\t\n", status{2, 6, nil, false}, true},
		"no line of groups":      {ids, status{2, 6, nil, false}, true},
		"no line end":            {ids + "Groups:\t9", status{2, 6, []uint32{9}, false}, true},
		"a name like a line":     {"Name:\tUid:\\n0 0 0 0\nx Uid: 0 0\n" + ids, status{2, 6, nil, false}, true},
		"a long line":            {"Name:\t" + strings.Repeat("x", 100_000) + "\n" + ids, status{2, 6, nil, false}, true},
		"largest ID":             {"Uid: 0 4294967295\nGid: 0 0\n", status{4294967295, 0, nil, false}, true},
		"empty":                  {"", status{}, false},
		"no uid":                 {"Gid:\t5\t6\t7\t8\n", status{}, false},
		"one uid":                {"Uid:\t5\nGid:\t5\t6\n", status{}, false},
		"uid too large":          {"Uid:\t5\t4294967296\nGid:\t5\t6\n", status{}, false},
		"negative":               {"Uid:\t5\t-1\nGid:\t5\t6\n", status{}, false},
		"group that is no ID":    {ids + "Groups:\tstaff\n", status{}, false},
		"too many groups":        {ids + "Groups:\t" + strings.Repeat("1 ", maxGroups+1) + "\n", status{2, 6, slices.Repeat([]uint32{1}, maxGroups), true}, true},
		"as many as are allowed": {ids + "Groups:\t" + strings.Repeat("1 ", maxGroups) + "\n", status{2, 6, slices.Repeat([]uint32{1}, maxGroups), false}, true},
	} {
		got, err := parseStatus([]byte(tt.text))
		if (err == nil) != tt.ok || got.uid != tt.want.uid || got.gid != tt.want.gid ||
			got.moreGroups != tt.want.moreGroups || !slices.Equal(got.groups, tt.want.groups) {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
}

func FuzzParseStatus(f *testing.F) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("Uid:\t1\t2\nGid:\t1\t2\nGroups:\t4294967295\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		st, err := parseStatus(text)
		if err != nil {
			return
		}
		if len(st.groups) > maxGroups {
			t.Errorf("%d groups", len(st.groups))
		}
		// The parsed IDs are in the text.
		want := strconv.FormatUint(uint64(st.uid), 10)
		if !strings.Contains(string(text), want) {
			t.Errorf("user %s is not in %q", want, text)
		}
	})
}

func BenchmarkAttest(b *testing.B) {
	for name, cfg := range map[string]Config{"default": {}, "sha256": {SHA256Limit: 1 << 30}} {
		b.Run(name, func(b *testing.B) {
			p, err := attest.FromPID(os.Getpid(), 0, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			attestors := []attest.Attestor{New(cfg)}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := attest.Selectors(b.Context(), p, attestors); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
