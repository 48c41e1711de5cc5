package unix

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// disk holds the files of a test, all zeros, and records the reads.
type disk struct {
	t      *testing.T
	hashes *hashes
	gate   chan struct{} // reading waits until it is closed
	wg     sync.WaitGroup

	mu     sync.Mutex
	opened int
	closed int
	log    []string // the name of the file for each slice that is read
}

func newDisk(t *testing.T) *disk {
	d := &disk{t: t, hashes: newHashes(), gate: make(chan struct{})}
	// The clock is ahead, so that the test's files are not just changed.
	d.hashes.now = func() time.Time { return time.Now().Add(time.Hour) }
	t.Cleanup(d.wg.Wait)
	t.Cleanup(d.hashes.close)
	return d
}

func (d *disk) slices() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.log)
}

// diskFile is an open file.
type diskFile struct {
	disk  *disk
	name  string
	state fileID
	at    int64
	gate  <-chan struct{}
	after func(*fileID) // changes the state before it is read
	end   int64         // of the content, if less than the size
	err   error         // of reading
}

// file returns a file of n slices less one byte. Each name is another file.
func (d *disk) file(name string, n int64) *diskFile {
	size := n*sliceSize - 1
	sum := sha256.Sum256([]byte(name))
	return &diskFile{disk: d, name: name, gate: d.gate, end: size,
		state: fileID{ino: uint64(sum[0])<<16 | uint64(sum[1])<<8 | uint64(sum[2]), size: size, ctime: unix.NsecToTimespec(time.Now().UnixNano())}}
}

func (f *diskFile) Read(p []byte) (int, error) {
	if f.at%sliceSize == 0 {
		<-f.gate
		f.disk.mu.Lock()
		f.disk.log = append(f.disk.log, f.name)
		f.disk.mu.Unlock()
	}
	n := min(int64(len(p)), f.end-f.at)
	if n == 0 {
		return 0, io.EOF
	}
	clear(p[:n])
	f.at += n
	return int(n), f.err
}

func (f *diskFile) id() (fileID, error) {
	state := f.state
	if f.after != nil {
		f.after(&state)
	}
	return state, nil
}

func (f *diskFile) Close() error {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	f.disk.closed++
	return nil
}

// hash returns the hash of the file for a process of the user.
func (d *disk) hash(ctx context.Context, uid uint32, f *diskFile) (string, error) {
	return d.hashes.wait(ctx, uid, f.state, func() (file, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.opened++
		return f, nil
	})
}

// start calls hash on a goroutine, and returns when that waits.
func (d *disk) start(ctx context.Context, uid uint32, f *diskFile) <-chan error {
	done := make(chan error, 1)
	d.wg.Go(func() {
		got, err := d.hash(ctx, uid, f)
		if err == nil && got != zeros(f.state.size) {
			err = fmt.Errorf("hash %s is wrong", got)
		}
		done <- err
	})
	synctest.Wait()
	return done
}

var zeroSums sync.Map

func zeros(size int64) string {
	if sum, ok := zeroSums.Load(size); ok {
		return sum.(string)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(make([]byte, size)))
	zeroSums.Store(size, sum)
	return sum
}

// Eight large files of one user delay a small one of another user, or of the same
// user, by at most a slice of each.
func TestUsersTakeTurns(t *testing.T) {
	t.Parallel()
	for name, uid := range map[string]uint32{"of another user": 2, "of the same user": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(t)
				var large []<-chan error
				for i := range 8 {
					large = append(large, d.start(t.Context(), 1, d.file(fmt.Sprint("large", i), 3)))
				}
				small := d.start(t.Context(), uid, d.file("small", 1))
				close(d.gate)
				if err := <-small; err != nil {
					t.Error(err)
				}
				for _, done := range large {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
				// One more for a slice that was started before.
				most := 1 + map[uint32]int{1: 8, 2: 1}[uid]
				if at := slices.Index(d.slices(), "small"); at < 0 || at > most {
					t.Errorf("%d slices were hashed before the small file, want %d at most: %q", at, most, d.slices())
				}
			})
		})
	}
}

// Whatever users request: while a user waits, no other user gets two slices.
func TestTurnsAreFair(t *testing.T) {
	t.Parallel()
	for seed := range uint64(5) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			d := newDisk(t)
			users := make(map[string]uint32) // by file
			left := make(map[uint32]int)     // slices by user
			var all []<-chan error
			for i := range 12 {
				name, uid, n := fmt.Sprint(i), uint32(rnd.IntN(4)), 1+rnd.IntN(3)
				users[name] = uid
				left[uid] += n
				all = append(all, d.start(t.Context(), uid, d.file(name, int64(n))))
			}
			close(d.gate)
			for _, done := range all {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			since := make(map[uint32]map[uint32]int) // by user: slices of the others since its last
			for at, name := range d.slices() {
				uid := users[name]
				if left[uid]--; at == 0 {
					continue // was started before there were others
				}
				since[uid] = nil
				for other, n := range left {
					if other == uid || n == 0 {
						continue
					}
					if since[other] == nil {
						since[other] = make(map[uint32]int)
					}
					if since[other][uid]++; since[other][uid] > 1 {
						t.Errorf("seed %d, slice %d: user %d waits while user %d gets slices: %q", seed, at, other, uid, d.slices())
					}
				}
			}
		})
	}
}

// A hash that was started is finished although its caller gives up.
func TestStartedHashIsFinishedAndCached(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t)
		f := d.file("large", 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := <-d.start(ctx, 1, f); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want DeadlineExceeded", err)
		}
		close(d.gate)
		synctest.Wait()
		for uid := range uint32(3) {
			if err := <-d.start(t.Context(), uid, f); err != nil {
				t.Error(err)
			}
		}
		if d.opened != 1 || d.closed != 1 || len(d.slices()) != 2 {
			t.Errorf("opened %d times, closed %d times, %d slices read; want 1, 1, 2", d.opened, d.closed, len(d.slices()))
		}
	})
}

// A job that was not started is dropped with its last caller: a user may name any
// number of files.
func TestQueuedHashIsDroppedWithItsLastCaller(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t)
		ctx, cancel := context.WithCancel(t.Context())
		var all []<-chan error
		for i := range 2 * maxStarted {
			all = append(all, d.start(ctx, 1, d.file(fmt.Sprint(i), 1)))
		}
		shared := d.file(fmt.Sprint(2*maxStarted-1), 1)
		other := d.start(t.Context(), 2, shared)
		cancel()
		for _, done := range all {
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want Canceled", err)
			}
		}
		close(d.gate)
		if err := <-other; err != nil {
			t.Errorf("the hash that another user waits for: %v", err)
		}
		synctest.Wait()
		if got := d.slices(); len(got) != 2 || got[1] != shared.name {
			t.Errorf("hashed %q, want the first, which was started, and the shared one", got)
		}
		if d.closed != d.opened || len(d.hashes.jobs)+len(d.hashes.queues)+len(d.hashes.turns) != 0 {
			t.Errorf("%d files of %d closed, %d jobs, %d queues, %d turns left",
				d.closed, d.opened, len(d.hashes.jobs), len(d.hashes.queues), len(d.hashes.turns))
		}
	})
}

// A read that hangs, such as on a network file system whose server is down, delays
// only its own callers.
func TestHangingRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t)
		close(d.gate)
		hung := make(chan struct{})
		var stuck []<-chan error
		for i := range 3 {
			f := d.file(fmt.Sprint("hangs", i), 2)
			f.gate = hung
			stuck = append(stuck, d.start(t.Context(), 1, f))
		}
		start := time.Now()
		if err := <-d.start(t.Context(), 2, d.file("local", 3)); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > stuckAfter*3 {
			t.Errorf("another user's hash took %v", took)
		}
		close(hung)
		for _, done := range stuck {
			if err := <-done; err != nil {
				t.Errorf("when the server is back: %v", err)
			}
		}
	})
}

func TestHashOfChangedFile(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(*diskFile)
		want   string
	}{
		"written in place":  {func(f *diskFile) { f.after = func(id *fileID) { id.mtime.Nsec++; id.ctime.Nsec++ } }, errChanged.Error()},
		"with its old time": {func(f *diskFile) { f.after = func(id *fileID) { id.ctime.Nsec++ } }, errChanged.Error()},
		"longer":            {func(f *diskFile) { f.after = func(id *fileID) { id.size++ } }, errChanged.Error()},
		"cut":               {func(f *diskFile) { f.end /= 2 }, errChanged.Error()},
		"cannot be read":    {func(f *diskFile) { f.err = unix.EIO }, "input/output error"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(t)
				close(d.gate)
				f := d.file("app", 1)
				tt.change(f)
				if err := <-d.start(t.Context(), 1, f); !says(err, tt.want) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				if err := <-d.start(t.Context(), 1, d.file("app", 1)); err != nil {
					t.Errorf("when it no longer changes: %v", err)
				}
			})
		})
	}
}

// File systems record the time of a change in units. A file that was changed in the
// unit of its read may have another content with the same ID.
func TestHashOfJustChangedFileIsNotCached(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		nsec   int64 // of the time of the change
		age    time.Duration
		hashed int // of two callers
	}{
		{123, -time.Hour, 2},
		{123, 0, 2},
		{123, fineTimeUnit, 2},
		{123, fineTimeUnit + 1, 1},
		{123, time.Hour, 1},
		{0, coarseTimeUnit, 2},
		{0, coarseTimeUnit + 1, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := newDisk(t)
			close(d.gate)
			f := d.file("app", 1)
			f.state.ctime.Nsec = tt.nsec
			d.hashes.now = func() time.Time { return time.Unix(f.state.ctime.Unix()).Add(tt.age) }
			for range 2 {
				f.at = 0
				if err := <-d.start(t.Context(), 1, f); err != nil {
					t.Error(err)
				}
			}
			if d.opened != tt.hashed {
				t.Errorf("%+v: hashed %d times", tt, d.opened)
			}
		})
	}
}

// The hashes of one user do not evict those of the others.
func TestCachedHashesAreLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t)
		close(d.gate)
		tiny := func(name string) *diskFile {
			f := d.file(name, 1)
			f.end, f.state.size = 1, 1
			return f
		}
		mine := tiny("mine")
		for uid := range uint32(2) {
			if err := <-d.start(t.Context(), 7+uid, mine); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 2 * maxHashes {
			if _, err := d.hash(t.Context(), 1, tiny(fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.hashes.wait(t.Context(), 7, mine.state, func() (file, error) { return nil, errors.New("opened again") }); err != nil {
			t.Error(err)
		}
		if len(d.hashes.cached) != maxHashes || d.hashes.recent.Len() != maxHashes {
			t.Errorf("%d and %d cached, want %d", len(d.hashes.cached), d.hashes.recent.Len(), maxHashes)
		}
	})
}

func TestCloseEndsHashing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t)
		var waiting []<-chan error
		for i := range 3 {
			waiting = append(waiting, d.start(t.Context(), uint32(i), d.file(fmt.Sprint(i), 5)))
		}
		closed := make(chan struct{})
		d.wg.Go(func() { d.hashes.close(); close(closed) })
		synctest.Wait()
		select {
		case <-closed:
			t.Error("did not wait for the current slice")
		default:
		}
		close(d.gate)
		<-closed
		for _, done := range append(waiting, d.start(t.Context(), 9, d.file("late", 1))) {
			if err := <-done; !errors.Is(err, errClosed) {
				t.Errorf("got %v, want %v", err, errClosed)
			}
		}
		if d.closed != d.opened || len(d.slices()) != 1 {
			t.Errorf("%d of %d files closed, %d slices read", d.closed, d.opened, len(d.slices()))
		}
	})
}

// The hash of a program is computed once for all of its processes, and again after
// its file was changed.
func TestHashOfProgramIsCached(t *testing.T) {
	t.Parallel()
	path := testProgram(t, t.TempDir(), "app")
	p, other := run(t, path, nil), run(t, path, nil)
	a := New(Config{SHA256Limit: 1 << 30})
	defer a.Close()
	a.hashes.now = func() time.Time { return time.Now().Add(time.Hour) }
	want := with(values(t, a, p), "sha256:")
	// A hash that can only come from the cache.
	a.hashes.mu.Lock()
	for _, el := range a.hashes.cached {
		el.Value.(*hashJob).sum = "kept"
	}
	a.hashes.mu.Unlock()
	if got := with(values(t, a, other), "sha256:"); !slices.Equal(got, []string{"sha256:kept"}) {
		t.Errorf("the program was hashed again: %q", got)
	}
	now := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, now, now); err != nil {
		t.Fatal(err)
	}
	if got := with(values(t, a, other), "sha256:"); !slices.Equal(got, want) {
		t.Errorf("after a change: %q, want %q", got, want)
	}
}

// A real file may grow while it is hashed.
func TestHashOfGrowingFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "app")
	if err := os.WriteFile(path, []byte(strings.Repeat("x", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	id, err := osFile{f}.id()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("y"); err != nil {
		t.Fatal(err)
	}
	s := newHashes()
	defer s.close()
	if sum, err := s.wait(t.Context(), 1, id, func() (file, error) { return osFile{f}, nil }); !errors.Is(err, errChanged) {
		t.Errorf("got %q, %v, want %v", sum, err, errChanged)
	}
}
