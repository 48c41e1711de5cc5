package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// copyOf backs up a store to a new file.
func copyOf(t testing.TB, s *store.Store) (path string) {
	t.Helper()
	var out bytes.Buffer
	size, err := s.Backup(context.Background(), &out)
	if err != nil || size != int64(out.Len()) {
		t.Fatalf("%d bytes, returned %d: %v", out.Len(), size, err)
	}
	path = newPath(t)
	writeFile(t, path, out.Bytes())
	return path
}

// TestBackupIsConsistent: a backup during writes has every commit completely or not at
// all, and every commit that returned before.
func TestBackupIsConsistent(t *testing.T) {
	t.Parallel()
	s := opened(t, newPath(t))
	d := s.Deployment("default")
	fill(t, d)
	ctx, stop := context.WithCancel(t.Context())
	var done [4]atomic.Int64 // by each of the writers
	var wg sync.WaitGroup
	for w := range done {
		wg.Go(func() {
			for n := int64(1); ctx.Err() == nil; n++ {
				var pair []spireapi.StoredEntry
				for _, side := range []string{"left", "right"} {
					hint := strings.Repeat("x", int(n*977%9000)) // pages come and go
					pair = append(pair, spireapi.StoredEntry{Entry: spireapi.Entry{
						ID: fmt.Sprintf("%s-%d", side, w), SPIFFEID: spiffeid.RequireFromPath(td, "/w"), Hint: hint,
					}, Revision: n})
				}
				if err := d.PutEntries(context.Background(), pair, nil); err != nil {
					t.Error(err)
					return
				}
				done[w].Store(n)
			}
		})
	}
	for range 8 {
		var before, after [len(done)]int64
		for w := range done {
			before[w] = done[w].Load()
		}
		path := copyOf(t, s)
		for w := range done {
			after[w] = done[w].Load() + 1 // may be durable already
		}
		c := open(t, path)
		got := map[string]int64{}
		list, err := c.Deployment("default").Entries(t.Context())
		if err != nil {
			t.Error(err)
		}
		for _, e := range list {
			got[e.ID] = e.Revision
		}
		for w := range done {
			l, r := got["left-"+strconv.Itoa(w)], got["right-"+strconv.Itoa(w)]
			if l != r || l < before[w] || l > after[w] {
				t.Errorf("writer %d: %d and %d in the copy, %d before it, %d after", w, l, r, before[w], after[w])
			}
		}
		closed(t, c)
	}
	stop()
	wg.Wait()
}

// blocked is a writer whose Write blocks until gate.
type blocked struct {
	reached chan struct{}
	gate    chan error
}

func (b blocked) Write(p []byte) (int, error) {
	select {
	case b.reached <- struct{}{}:
	default:
	}
	return len(p), <-b.gate
}

// TestSlowBackup: a slow reader of the copy delays neither writers nor the reuse of pages
// that they free.
func TestSlowBackup(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := open(t, newPath(t))
		defer closed(t, s)
		d := s.Deployment("default")
		fill(t, d)
		churn := func() {
			for n := range 20 {
				if err := update(t.Context(), d, 7, strings.Repeat("x", 50_000+n)); err != nil {
					t.Fatal(err)
				}
			}
		}
		churn()
		used := s.Used(t)
		w := blocked{make(chan struct{}, 1), make(chan error)}
		result := make(chan error, 1)
		go func() { _, err := s.Backup(t.Context(), w); result <- err }()
		<-w.reached
		churn()
		if grown := s.Used(t) - used; grown > 200_000 { // of a million that was written
			t.Errorf("the store grew by %d bytes", grown)
		}
		// A second backup waits until its deadline.
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.Backup(ctx, io.Discard); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the second: %v", err)
		}
		broken := errors.New("broken pipe")
		w.gate <- broken
		if err := <-result; !errors.Is(err, broken) || !strings.Contains(err.Error(), "copy store "+s.Path()) {
			t.Errorf("the first: %v", err)
		}
		if _, err := s.Backup(t.Context(), io.Discard); err != nil {
			t.Errorf("the third: %v", err)
		}
		// A backup ends at the first part after its context is done.
		if err := update(t.Context(), d, 8, strings.Repeat("x", 300_000)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel = context.WithCancel(t.Context())
		go func() { _, err := s.Backup(ctx, w); result <- err }()
		<-w.reached
		cancel()
		w.gate <- nil
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("the fourth: %v", err)
		}
		if names, _ := os.ReadDir(filepath.Dir(s.Path())); len(names) != 1 {
			t.Errorf("files left behind: %v", names)
		}
	})
}

// TestBackupNeedsRoom: a copy never fills the server's disk.
func TestBackupNeedsRoom(t *testing.T) {
	t.Parallel()
	dir, _ := tmpfs(t, "size=8m")
	s := opened(t, filepath.Join(dir, "server.db"))
	d := s.Deployment("default")
	if err := update(t.Context(), d, 1, strings.Repeat("x", 3_200_000)); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := s.Backup(t.Context(), &out); err == nil || !strings.Contains(err.Error(), "make room") || out.Len() > 0 {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
	if err := update(t.Context(), d, 2, "1"); err != nil {
		t.Error(err)
	}
}

// TestBackupFails: there is no copy of a store whose disk fails, or that is closed.
func TestBackupFails(t *testing.T) {
	t.Parallel()
	s := open(t, newPath(t))
	fill(t, s.Deployment("default"))
	back := s.PutDevice(t, "/dev/full") // reads as zeros
	var out bytes.Buffer
	if _, err := s.Backup(t.Context(), &out); err == nil || out.Len() > 0 {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
	back()
	if _, err := s.Backup(t.Context(), io.Discard); err != nil {
		t.Error(err)
	}
	closed(t, s)
	if _, err := s.Backup(t.Context(), io.Discard); !errors.Is(err, store.ErrClosed) {
		t.Error(err)
	}
}

func TestInspect(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	o := options()
	o.Now = func() time.Time { return start }
	s, err := store.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s.Deployment("default"))
	if err := s.Deployment("tokens").PutToken(t.Context(), spireapi.Token{Value: "token"}); err != nil {
		t.Fatal(err)
	}
	backup := copyOf(t, s)
	if err := openFails(t, path, options()); !errors.Is(err, store.ErrInUse) {
		t.Error(err)
	}
	closed(t, s)
	data := readFile(t, backup)
	withoutKey := store.Options{TrustDomain: td}
	for name, o := range map[string]store.Options{"with the key": options(), "without": withoutKey} {
		got, err := store.Inspect(t.Context(), backup, o)
		if err != nil || got.Size != int64(len(data)) || !got.CopiedAt.Equal(start) ||
			fmt.Sprint(got.Deployments) != "[{default 2 100 20} {tokens 0 0 0}]" {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if got, err := store.Inspect(t.Context(), path, withoutKey); err != nil || !got.CopiedAt.IsZero() {
		t.Errorf("no copy: %+v, %v", got, err)
	}
	other := withoutKey
	other.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
	if _, err := store.Inspect(t.Context(), backup, other); err == nil || !strings.Contains(err.Error(), "belongs to trust domain example.org") {
		t.Error(err)
	}
	if _, err := store.Inspect(t.Context(), backup, store.Options{TrustDomain: td, Seal: seal.Ephemeral()}); !errors.Is(err, seal.ErrWrongKey) {
		t.Error(err)
	}
	if !bytes.Equal(data, readFile(t, backup)) {
		t.Error("the copy was changed")
	}
	for what, broken := range map[string][]byte{
		"cut off":         data[:len(data)-4096],
		"a byte of value": bytes.Replace(data, []byte(`"Version":"1.0"`), []byte(`"Version":"1.1"`), 1),
		"the mark":        bytes.Replace(data, []byte("copied_at"), []byte("copied_bt"), 1),
	} {
		writeFile(t, backup, broken)
		if _, err := store.Inspect(t.Context(), backup, withoutKey); !errors.Is(err, store.ErrDamaged) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := store.Inspect(t.Context(), newPath(t), withoutKey); !errors.Is(err, syscall.ENOENT) {
		t.Error(err)
	}
}
