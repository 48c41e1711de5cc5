package store_test

import (
	"bytes"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/store"
)

// wasteful makes a store of which nine tenths are free, and returns its contents.
func wasteful(t testing.TB, path string, o store.Options) (contents string) {
	t.Helper()
	s, err := store.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	d := s.Deployment("default")
	fill(t, d)
	all := rows(30_000)
	for _, c := range []ledger.Change{{Put: all}, {Gone: all[1000:]}} {
		if err := d.SaveLedger(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	contents = mustContents(t, s)
	closed(t, s)
	return contents
}

func sizeOf(t testing.TB, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// logged opens a store and returns its log.
func logged(t *testing.T, path string, o store.Options) (s *store.Store, log string) {
	t.Helper()
	var out bytes.Buffer
	o.Log = slog.New(slog.NewTextHandler(&out, nil))
	s, err := store.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return s, out.String()
}

// checkNoOtherFiles checks that the store is the only file in its folder.
func checkNoOtherFiles(t *testing.T, path string) {
	t.Helper()
	if names, err := os.ReadDir(filepath.Dir(path)); err != nil || len(names) != 1 {
		t.Errorf("files left behind: %v, %v", names, err)
	}
}

// TestCompaction: Open shrinks a file of which most is free, and keeps its contents, mode
// and owner.
func TestCompaction(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	want := wasteful(t, path, options())
	before := sizeOf(t, path)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	owner := 0
	if os.Getuid() == 0 {
		owner = 1234
		if err := os.Chown(path, owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	// Opening it read-only does not change it.
	o := options()
	o.ReadOnly = true
	s, log := logged(t, path, o)
	closed(t, s)
	if sizeOf(t, path) != before || log != "" {
		t.Errorf("read only: %d bytes, log %s", sizeOf(t, path), log)
	}
	s, log = logged(t, path, options())
	if after := sizeOf(t, path); after > before/3 || !strings.Contains(log, "store compacted") {
		t.Errorf("%d bytes, before %d; log %s", after, before, log)
	}
	if got := mustContents(t, s); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o640 || os.Getuid() == 0 && info.Sys().(*syscall.Stat_t).Uid != uint32(owner) {
		t.Errorf("mode %v of %v, %v", info.Mode(), info.Sys(), err)
	}
	// The new file is locked, durable and compact.
	if err := openFails(t, path, options()); !errors.Is(err, store.ErrInUse) {
		t.Error(err)
	}
	if err := update(t.Context(), s.Deployment("default"), 1000, "1"); err != nil {
		t.Fatal(err)
	}
	want = mustContents(t, s)
	closed(t, s)
	s, log = logged(t, path, options())
	if got := mustContents(t, s); got != want || log != "" {
		t.Errorf("opened again: %s\nwant %s\nlog %s", got, want, log)
	}
	closed(t, s)
	checkNoOtherFiles(t, path)
}

// TestCompactionWithWaiters: an Open that waits for the lock during a compaction gets the
// new file.
func TestCompactionWithWaiters(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	wasteful(t, path, options())
	var all sync.WaitGroup
	for n := range 4 {
		all.Go(func() {
			s, err := store.Open(path, options())
			if err == nil {
				err = errors.Join(update(t.Context(), s.Deployment("default"), 1000+n, "1"), s.Close())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	s := opened(t, path)
	for n := range 4 {
		if a, err := s.Deployment("default").Agent(t.Context(), agentID(1000+n)); err != nil || a == nil {
			t.Errorf("agent %d: %v, %v", n, a, err)
		}
	}
}

// TestCompactionFails: a failed compaction is logged, and the store is used as it is.
func TestCompactionFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		hinder func(t *testing.T, path string)
		want   string // in the log
	}{
		"no room": {func(t *testing.T, path string) { fillUp(t, filepath.Join(filepath.Dir(path), "ballast")) }, "make room"},
		// The file alone is mounted, as in a container.
		"it cannot be replaced": {func(t *testing.T, path string) {
			if err := syscall.Mount(path, path, "", syscall.MS_BIND, ""); err != nil {
				t.Skip(err)
			}
			t.Cleanup(func() { _ = syscall.Unmount(path, syscall.MNT_DETACH) })
		}, "put it in its place"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := tmpfs(t, "size=64m")
			path := filepath.Join(dir, "server.db")
			want := wasteful(t, path, options())
			before := sizeOf(t, path)
			c.hinder(t, path)
			s, log := logged(t, path, options())
			defer closed(t, s)
			if !strings.Contains(log, "store not compacted") || !strings.Contains(log, c.want) || sizeOf(t, path) != before {
				t.Errorf("%d bytes, before %d; the log says %s", sizeOf(t, path), before, log)
			}
			if got := mustContents(t, s); got != want {
				t.Errorf("%s\nwant %s", got, want)
			}
			if err := update(t.Context(), s.Deployment("default"), 1000, "1"); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(dir, ".server.db.compact")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the copy is left behind: %v", err)
			}
		})
	}
}

// openEnv and keyEnv make a test process open a store with a key file and kill itself.
const openEnv, keyEnv = "RENEWD_TEST_OPEN", "RENEWD_TEST_KEY"

// TestCompactionKilled kills processes during a compaction, at random moments. The next
// Open finds a complete store.
func TestCompactionKilled(t *testing.T) {
	t.Parallel()
	if path := os.Getenv(openEnv); path != "" {
		m, err := seal.File(os.Getenv(keyEnv))
		if err == nil {
			_, err = store.Open(path, store.Options{TrustDomain: td, Seal: m})
		}
		if err != nil {
			t.Fatal(err)
		}
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	keyFile := filepath.Join(t.TempDir(), "key")
	if err := seal.NewFile(keyFile); err != nil {
		t.Fatal(err)
	}
	m, err := seal.File(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	o := store.Options{TrustDomain: td, Seal: m}
	original := newPath(t)
	want := wasteful(t, original, o)
	data := readFile(t, original)
	random := rand.New(rand.NewPCG(1, 2))
	met := map[string]int{}
	life := 2 * time.Second
	for n := range 25 {
		path := newPath(t)
		writeFile(t, path, data)
		temp := filepath.Join(filepath.Dir(path), ".server.db.compact")
		cmd := exec.Command(os.Args[0], "-test.run=^TestCompactionKilled$")
		cmd.Env = append(os.Environ(), openEnv+"="+path, keyEnv+"="+keyFile)
		begin := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Wait until the copy exists, to kill the process during the compaction.
		gone := make(chan struct{})
		go func() { _ = cmd.Wait(); close(gone) }()
		for end := time.After(life); ; {
			if _, err := os.Stat(temp); err == nil {
				break
			}
			select {
			case <-gone:
			case <-end:
			case <-time.After(time.Millisecond):
				continue
			}
			break
		}
		select {
		case <-gone: // the process killed itself
			life = max(10*time.Millisecond, time.Since(begin))
		case <-time.After(time.Duration(random.Int64N(int64(120 * time.Millisecond)))):
			_ = cmd.Process.Kill()
			<-gone
		}
		switch _, err := os.Stat(temp); {
		case err == nil:
			met["during"]++
		case sizeOf(t, path) < int64(len(data)):
			met["after"]++
		default:
			met["before"]++
		}
		s, err := store.Open(path, o)
		if err != nil {
			t.Fatalf("process %d: %v", n, err)
		}
		if got := mustContents(t, s); got != want {
			t.Errorf("process %d: %s\nwant %s", n, got, want)
		}
		closed(t, s)
		checkNoOtherFiles(t, path)
		if size := sizeOf(t, path); size > int64(len(data))/3 {
			t.Errorf("process %d: %d bytes afterwards", n, size)
		}
	}
	if met["during"] == 0 {
		t.Errorf("no process was killed during the compaction: %v", met)
	}
}

// TestBackupIsCompact: free pages are not copied.
func TestBackupIsCompact(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	wasteful(t, path, options())
	data := readFile(t, path)
	small := sizeOf(t, copyOf(t, opened(t, path)))
	// Now a store whose pages were freed while it was open.
	path = newPath(t)
	s := open(t, path)
	d := s.Deployment("default")
	all := rows(30_000)
	for _, c := range []ledger.Change{{Put: all}, {Gone: all[1000:]}} {
		if err := d.SaveLedger(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	want := mustContents(t, s)
	backup := copyOf(t, s)
	if size := sizeOf(t, backup); size > sizeOf(t, path)/3 {
		t.Errorf("%d bytes of %d; after a compaction %d of %d", size, sizeOf(t, path), small, len(data))
	}
	closed(t, s)
	s = opened(t, backup)
	if got := mustContents(t, s); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
