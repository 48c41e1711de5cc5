package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/config"
)

// maxFile is the largest file that is read, in bytes.
const maxFile = 32 << 20

// folderRemedy is the remedy if the folder cannot be created or written.
const folderRemedy = "data_dir must be a folder that the agent's user can write, on a file system that is not read-only and not full"

// folder is an open data_dir whose lock this process holds.
type folder struct {
	path string
	root *os.Root
	lock *os.File
}

// openFolder opens the folder at path, creates it if it is missing, and locks it.
func openFolder(path string) (_ *folder, err error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, config.FileError(fmt.Errorf("create the folder: %w: %s", err, folderRemedy))
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, config.FileError(fmt.Errorf("%w: %s", err, folderRemedy))
	}
	f := &folder{path: path, root: root}
	defer func() {
		if err != nil {
			_ = f.close()
		}
	}()
	info, err := root.Stat(".")
	if err != nil {
		return nil, err
	}
	// The owner of the folder can replace the key in it.
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil, config.Permanent(fmt.Errorf("%s belongs to user %d and this process runs as %d: chown it, or run as its owner", path, st.Uid, os.Geteuid()))
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := root.Chmod(".", 0o700); err != nil {
			return nil, config.FileError(fmt.Errorf("%s can be read by others (mode %v): chmod it to 0700: %w", path, info.Mode().Perm(), err))
		}
	}
	f.lock, err = root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, syscall.EROFS) {
		// The kernel often remounts a disk with errors read-only. Its files
		// suffice for a start.
		f.lock, err = root.Open(lockFile)
	}
	if err != nil {
		return nil, config.FileError(fmt.Errorf("open the lock file: %w: %s", err, folderRemedy))
	}
	if err := syscall.Flock(int(f.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another agent: stop that one, or give this one a folder of its own", path)
		}
		return nil, fmt.Errorf("lock %s: %w", f.pathOf(lockFile), err)
	}
	return f, nil
}

// close unlocks and closes the folder.
func (f *folder) close() error {
	var errs []error
	if f.lock != nil {
		// Closing alone does not suffice: a child process between fork and exec
		// shares the open file and would keep the lock.
		errs = append(errs, syscall.Flock(int(f.lock.Fd()), syscall.LOCK_UN), f.lock.Close())
	}
	return errors.Join(append(errs, f.root.Close())...)
}

// isCurrent reports whether the paths of the folder and of its lock file still lead
// to those that are open.
func (f *folder) isCurrent() bool {
	return sameFile(func() (fs.FileInfo, error) { return os.Stat(f.path) }, func() (fs.FileInfo, error) { return f.root.Stat(".") }) &&
		sameFile(func() (fs.FileInfo, error) { return f.root.Stat(lockFile) }, f.lock.Stat)
}

func sameFile(a, b func() (fs.FileInfo, error)) bool {
	x, errX := a()
	y, errY := b()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// checkAccess returns an error when the permissions or a read-only mount prevent
// writing. It does not write.
func (f *folder) checkAccess() error {
	if err := unix.Faccessat(unix.AT_FDCWD, f.path, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return &fs.PathError{Op: "write to", Path: f.path, Err: err}
	}
	return nil
}

func (f *folder) pathOf(file string) string { return filepath.Join(f.path, file) }

// stamp identifies the content of a file without reading it. The zero stamp means
// that there is no file.
type stamp struct {
	inode    uint64
	size     int64
	modified int64 // nanoseconds
	mode     fs.FileMode
}

func stampOf(info fs.FileInfo) stamp {
	out := stamp{size: info.Size(), modified: info.ModTime().UnixNano(), mode: info.Mode()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		out.inode = st.Ino
	}
	return out
}

func (f *folder) stamp(file string) (stamp, error) {
	info, err := f.root.Lstat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return stamp{}, nil
	}
	if err != nil {
		return stamp{}, err
	}
	return stampOf(info), nil
}

// read returns the content of a file and its stamp, zero when it does not exist.
func (f *folder) read(file string) ([]byte, stamp, error) {
	r, err := f.root.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, stamp{}, nil
	}
	if err != nil {
		return nil, stamp{}, err
	}
	defer r.Close()
	info, err := r.Stat()
	if err != nil {
		return nil, stamp{}, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := r.Chmod(0o600); err != nil {
			return nil, stamp{}, fmt.Errorf("%s can be read by others (mode %v): chmod it to 0600: %w", f.pathOf(file), info.Mode().Perm(), err)
		}
		if info, err = r.Stat(); err != nil {
			return nil, stamp{}, err
		}
	}
	b, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, stamp{}, fmt.Errorf("read %s: %w", f.pathOf(file), err)
	}
	if len(b) > maxFile {
		return nil, stamp{}, fmt.Errorf("%s is larger than %d bytes: the agent has not written it", f.pathOf(file), maxFile)
	}
	return b, stampOf(info), nil
}

// write replaces a file atomically: after a crash it has either the old content or
// the new.
func (f *folder) write(file string, b []byte) (stamp, error) {
	temp := file + ".tmp"
	if err := f.writeTemp(temp, b); err != nil {
		return stamp{}, err
	}
	at, err := f.stamp(temp)
	if err != nil {
		return stamp{}, err
	}
	if err := f.root.Rename(temp, file); err != nil {
		return stamp{}, err
	}
	return at, f.sync()
}

// writeTemp creates a file and syncs it to disk. It removes a file that a crash has
// left under that name, because its permissions are unknown.
func (f *folder) writeTemp(file string, b []byte) (err error) {
	if err := f.root.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w, err := f.root.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, w.Close())
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", f.pathOf(file), err), f.root.Remove(file))
		}
	}()
	if _, err := w.Write(b); err != nil {
		return err
	}
	return w.Sync()
}

// remove deletes a file, if there is one.
func (f *folder) remove(file string) error {
	if err := f.root.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.sync()
}

// probe checks that an identity could be saved now: it writes a file of that size and
// removes it.
func (f *folder) probe() error {
	const file = identityFile + ".probe"
	if err := f.writeTemp(file, make([]byte, 16<<10)); err != nil {
		return err
	}
	return f.root.Remove(file)
}

// moveAside renames a file so that the agent no longer uses it, and returns its new
// path.
func (f *folder) moveAside(file, why string, now time.Time) (string, error) {
	to := file + "." + why + "-" + now.UTC().Format("20060102T150405.000000000Z")
	if err := f.root.Rename(file, to); err != nil {
		return "", err
	}
	return f.pathOf(to), f.sync()
}

// sync makes renames in the folder durable (fsync(2): syncing a file does not sync
// its directory entry).
func (f *folder) sync() error {
	d, err := f.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
