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
	// maxHashes bounds the cached hashes.
	maxHashes = 512
	// maxStarted is how many files of one user are hashed concurrently. The others
	// wait, and are dropped with their last caller.
	maxStarted = 32
	// stuckAfter is how long one turn may take before another worker takes over: a
	// read of a network file system can hang forever.
	stuckAfter = 5 * time.Second
	// fineTimeUnit and coarseTimeUnit exceed the time units of file systems. Those
	// that store parts of a second use the kernel's tick (up to 10 ms), the others
	// use up to two seconds (FAT).
	fineTimeUnit   = 100 * time.Millisecond
	coarseTimeUnit = 2 * time.Second
)

var (
	errClosed  = errors.New("agent is stopping")
	errChanged = errors.New("the executable changed while it was read")
)

// fileID is a file in one state: its content does not change without a change of
// ctime, which no process can set. That holds once the time unit of ctime has passed;
// see [hashJob.cacheable].
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// hashes computes and caches the SHA-256 of executables. One goroutine hashes a slice
// of a file at a time, and the users take turns: a user with large or many files delays
// no other. A hash that was started is finished and cached even if its callers give
// up; otherwise callers with short deadlines would never get the hash of a large file.
// It is safe for concurrent use.
type hashes struct {
	now     func() time.Time
	workers sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	hasWorker bool                     // a worker runs and is not stuck
	jobs      map[fileID]*hashJob      // that are not finished
	queues    map[uint32][]*hashJob    // the same jobs by waiting user, never empty
	turns     []uint32                 // the users in queues, in the order of their turns
	cached    map[fileID]*list.Element // finished: elements of recent
	recent    *list.List               // of *hashJob, the least recently used first
}

func newHashes() *hashes {
	return &hashes{
		now:    time.Now,
		jobs:   make(map[fileID]*hashJob),
		queues: make(map[uint32][]*hashJob),
		cached: make(map[fileID]*list.Element),
		recent: list.New(),
	}
}

// hashOf returns the hex SHA-256 of an executable that a process of the user runs.
func (s *hashes) hashOf(ctx context.Context, uid uint32, exe *attest.Executable, limit int64) (string, error) {
	st, err := exe.Stat()
	if err != nil {
		return "", err
	}
	if st.Size > limit {
		path, _ := exe.Path()
		return "", fmt.Errorf("%s has %d bytes and unix.sha256_size_limit is %d: raise it if an entry needs this hash", path, st.Size, limit)
	}
	return s.wait(ctx, uid, idOf(&st), func() (file, error) {
		f, err := exe.Open()
		return osFile{f}, err
	})
}

// wait returns the hash of the file, which open opens if the hash is not cached.
func (s *hashes) wait(ctx context.Context, uid uint32, id fileID, open func() (file, error)) (string, error) {
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
		s.stopWaiting(j)
		return "", ctx.Err()
	}
}

// join returns the job for the file's hash, and the caller waits for it. Without a job
// or a cached hash it starts one with f, or returns nil if f is nil. It closes f if it
// is not needed.
func (s *hashes) join(uid uint32, id fileID, f file) *hashJob {
	s.mu.Lock()
	defer s.mu.Unlock()
	if el := s.cached[id]; el != nil {
		s.recent.MoveToBack(el)
		closeFile(f)
		return el.Value.(*hashJob)
	}
	j := s.jobs[id]
	switch {
	case s.closed:
		closeFile(f)
		j = newHashJob(id, nil)
		j.finish("", errClosed)
		return j
	case j != nil:
		closeFile(f)
	case f == nil:
		return nil
	default:
		j = newHashJob(id, f)
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
	if !s.hasWorker {
		s.hasWorker = true
		s.workers.Go(s.work)
	}
	return j
}

func closeFile(f file) {
	if f != nil {
		_ = f.Close() // was only read
	}
}

// stopWaiting is called by a caller that gives up.
func (s *hashes) stopWaiting(j *hashJob) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.waiters--; j.waiters == 0 && !j.started && s.jobs[j.id] == j {
		s.dequeueLocked(j)
		closeFile(j.file)
	}
}

// dequeueLocked removes a job that is finished or has no callers.
func (s *hashes) dequeueLocked(j *hashJob) {
	delete(s.jobs, j.id)
	for _, uid := range j.users {
		q := slices.DeleteFunc(s.queues[uid], func(other *hashJob) bool { return other == j })
		if s.queues[uid] = q; len(q) == 0 {
			delete(s.queues, uid)
			s.turns = slices.DeleteFunc(s.turns, func(other uint32) bool { return other == uid })
		}
	}
}

// work hashes until nothing is left to hash, or another worker has taken over.
func (s *hashes) work() {
	buf := make([]byte, 128<<10)
	for {
		s.mu.Lock()
		j := s.nextLocked()
		if j == nil {
			s.hasWorker = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()

		replaced := make(chan struct{})
		replacement := time.AfterFunc(stuckAfter, func() {
			s.workers.Go(s.work)
			close(replaced)
		})
		sum, more, err := j.slice(buf)
		active := replacement.Stop()
		if !active {
			<-replaced
		}
		s.mu.Lock()
		j.busy = false
		if !more {
			s.finishLocked(j, sum, err)
		} else if !active && !s.hasWorker && !s.closed {
			// The replacement has run out of work: this worker continues.
			active, s.hasWorker = true, true
		}
		s.mu.Unlock()
		if !active {
			return
		}
	}
}

// nextLocked returns the next job, or nil: of the user whose turn it is, the one that
// has waited for longest. Both go to the end of their queues.
func (s *hashes) nextLocked() *hashJob {
	if s.closed {
		return nil
	}
	for i, uid := range s.turns {
		queue := s.queues[uid]
		queue = queue[:min(len(queue), maxStarted)]
		for k, j := range queue {
			if j.busy {
				continue
			}
			j.busy = true
			if !j.started {
				j.started, j.startedAt = true, s.now()
			}
			copy(queue[k:], queue[k+1:])
			queue[len(queue)-1] = j
			s.turns = append(slices.Delete(s.turns, i, i+1), uid)
			return j
		}
	}
	return nil
}

// finishLocked passes the hash to the callers and caches it.
func (s *hashes) finishLocked(j *hashJob, sum string, err error) {
	s.dequeueLocked(j)
	closeFile(j.file)
	j.finish(sum, err)
	if err != nil || !j.cacheable() {
		return
	}
	s.cached[j.id] = s.recent.PushBack(j)
	if s.recent.Len() > maxHashes {
		s.evictLocked()
	}
}

// evictLocked drops the least recently used hash of the user with the most hashes, so
// that no user can evict those of others with many different files.
func (s *hashes) evictLocked() {
	count := make(map[uint32]int)
	most := 0
	for el := s.recent.Front(); el != nil; el = el.Next() {
		uid := el.Value.(*hashJob).users[0]
		count[uid]++
		most = max(most, count[uid])
	}
	for el := s.recent.Front(); el != nil; el = el.Next() {
		if j := el.Value.(*hashJob); count[j.users[0]] == most {
			delete(s.cached, j.id)
			s.recent.Remove(el)
			return
		}
	}
}

// close stops hashing and waits for the current slice. The callers get errClosed.
func (s *hashes) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.workers.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range s.jobs {
		s.finishLocked(j, "", errClosed)
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
