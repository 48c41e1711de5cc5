package unix

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/agent/attest"
)

const (
	// maxSums bounds the hashes kept.
	maxSums = 512
	// maxBegun is how many files of one user are hashed side by side. The others
	// wait, and are forgotten when nobody waits for them any more.
	maxBegun = 32
	// stuckAfter is how long one turn may take before the others no longer wait
	// for it: a read of a network file system can hang for ever.
	stuckAfter = 5 * time.Second
	// fineUnit and coarseUnit are more than the units in which file systems note
	// the time of a change: those that store parts of a second take it from the
	// kernel's tick (up to 10 ms), the others go up to two seconds (FAT).
	fineUnit   = 100 * time.Millisecond
	coarseUnit = 2 * time.Second
)

var (
	errClosed  = errors.New("the agent is stopping")
	errChanged = errors.New("the executable changed while it was read")
)

// fileID is a file in one state: its content does not change without a change of
// ctime, which nobody can set. That holds once the unit of time has passed in
// which ctime was noted; see [hashing.settled].
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// sums computes and keeps the SHA-256 of executables. One goroutine hashes a
// slice of a file at a time, and the users take turns with it: those who may run
// large files, or many, hold up nobody else. What was begun is finished and kept
// although its callers give up, or a large file would never be hashed for callers
// in a hurry. Safe for concurrent use.
type sums struct {
	now     func() time.Time
	workers sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	working bool                     // a worker runs that is not stuck
	jobs    map[fileID]*hashing      // that are not finished
	queues  map[uint32][]*hashing    // the same by the users who wait for them, never empty
	turns   []uint32                 // the users in queues, whose turn is next first
	kept    map[fileID]*list.Element // finished: elements of recent
	recent  *list.List               // of *hashing, the least recently used first
}

func newSums() *sums {
	return &sums{
		now:    time.Now,
		jobs:   make(map[fileID]*hashing),
		queues: make(map[uint32][]*hashing),
		kept:   make(map[fileID]*list.Element),
		recent: list.New(),
	}
}

// of returns the hex SHA-256 of an executable that a process of the user runs.
func (s *sums) of(ctx context.Context, uid uint32, exe *attest.Executable, limit int64) (string, error) {
	st, err := exe.Stat()
	if err != nil {
		return "", err
	}
	if limit >= 0 && st.Size > limit {
		path, _ := exe.Path()
		return "", fmt.Errorf("%s has %d bytes and unix.sha256_size_limit is %d: raise it if an entry needs this hash", path, st.Size, limit)
	}
	return s.sum(ctx, uid, idOf(&st), func() (file, error) {
		f, err := exe.Open()
		return osFile{f}, err
	})
}

// sum returns the hash of the file that open opens, if it is not known yet.
func (s *sums) sum(ctx context.Context, uid uint32, id fileID, open func() (file, error)) (string, error) {
	j := s.join(uid, id, nil)
	if j == nil {
		f, err := open()
		if err != nil {
			return "", err
		}
		j = s.join(uid, id, f)
	}
	select {
	case <-j.done:
		return j.sum, j.err
	case <-ctx.Done():
		s.leave(j)
		return "", ctx.Err()
	}
}

// join makes the caller wait for the file's hash. It returns nil when that is
// neither known nor being computed and f, from which to compute it, is nil. It
// closes f where it is not needed.
func (s *sums) join(uid uint32, id fileID, f file) *hashing {
	s.mu.Lock()
	defer s.mu.Unlock()
	if el := s.kept[id]; el != nil {
		s.recent.MoveToBack(el)
		closeFile(f)
		return el.Value.(*hashing)
	}
	j := s.jobs[id]
	switch {
	case s.closed:
		closeFile(f)
		j = newHashing(id, nil)
		j.finish("", errClosed)
		return j
	case j != nil:
		closeFile(f)
	case f == nil:
		return nil
	default:
		j = newHashing(id, f)
		s.jobs[id] = j
	}
	j.waiters++
	if !slices.Contains(j.users, uid) {
		j.users = append(j.users, uid)
		if s.queues[uid] == nil {
			s.turns = append(s.turns, uid)
		}
		s.queues[uid] = append(s.queues[uid], j)
	}
	if !s.working {
		s.working = true
		s.workers.Go(s.work)
	}
	return j
}

func closeFile(f file) {
	if f != nil {
		_ = f.Close() // was only read
	}
}

// leave is called by a caller that gives up.
func (s *sums) leave(j *hashing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.waiters--; j.waiters == 0 && !j.begun && s.jobs[j.id] == j {
		s.dequeue(j)
		closeFile(j.file)
	}
}

// dequeue forgets a file that is hashed, or that nobody waits for.
func (s *sums) dequeue(j *hashing) {
	delete(s.jobs, j.id)
	for _, uid := range j.users {
		q := slices.DeleteFunc(s.queues[uid], func(other *hashing) bool { return other == j })
		if s.queues[uid] = q; len(q) == 0 {
			delete(s.queues, uid)
			s.turns = slices.DeleteFunc(s.turns, func(other uint32) bool { return other == uid })
		}
	}
}

// work hashes until nothing is left to hash, or another worker has taken over.
func (s *sums) work() {
	buf := make([]byte, 128<<10)
	for {
		s.mu.Lock()
		j := s.next()
		if j == nil {
			s.working = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()

		relieved := make(chan struct{})
		stuck := time.AfterFunc(stuckAfter, func() {
			s.workers.Go(s.work)
			close(relieved)
		})
		sum, more, err := j.slice(buf)
		fresh := stuck.Stop()
		if !fresh {
			<-relieved
		}
		s.mu.Lock()
		j.busy = false
		if !more {
			s.finish(j, sum, err)
		} else if !fresh && !s.working && !s.closed {
			// The one that took over has run out of work meanwhile.
			fresh, s.working = true, true
		}
		s.mu.Unlock()
		if !fresh {
			return
		}
	}
}

// next chooses what to go on with, nil for nothing: of the user whose turn it is
// the file that was left alone for longest. Both go to the end of their line.
func (s *sums) next() *hashing {
	if s.closed {
		return nil
	}
	for i, uid := range s.turns {
		begun := s.queues[uid]
		begun = begun[:min(len(begun), maxBegun)]
		for k, j := range begun {
			if j.busy {
				continue
			}
			j.busy = true
			if !j.begun {
				j.begun, j.from = true, s.now()
			}
			copy(begun[k:], begun[k+1:])
			begun[len(begun)-1] = j
			s.turns = append(slices.Delete(s.turns, i, i+1), uid)
			return j
		}
	}
	return nil
}

// finish tells those who wait for the file and keeps the hash.
func (s *sums) finish(j *hashing, sum string, err error) {
	s.dequeue(j)
	closeFile(j.file)
	j.finish(sum, err)
	if err != nil || !j.settled() {
		return
	}
	s.kept[j.id] = s.recent.PushBack(j)
	if s.recent.Len() > maxSums {
		s.evict()
	}
}

// evict drops the least recently used hash of the user who has the most: nobody
// can push out those of others by running many different files.
func (s *sums) evict() {
	count := make(map[uint32]int)
	most := 0
	for el := s.recent.Front(); el != nil; el = el.Next() {
		uid := el.Value.(*hashing).users[0]
		count[uid]++
		most = max(most, count[uid])
	}
	for el := s.recent.Front(); el != nil; el = el.Next() {
		if j := el.Value.(*hashing); count[j.users[0]] == most {
			delete(s.kept, j.id)
			s.recent.Remove(el)
			return
		}
	}
}

// close ends hashing and waits for the slice under way. Those who wait for a hash
// are told.
func (s *sums) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.workers.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range s.jobs {
		s.finish(j, "", errClosed)
	}
}

// osFile is a file of the operating system.
type osFile struct{ *os.File }

func (f osFile) id() (fileID, error) {
	var st unix.Stat_t
	for {
		err := unix.Fstat(int(f.Fd()), &st)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return fileID{}, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
		}
		return idOf(&st), nil
	}
}
