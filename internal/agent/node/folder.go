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
)

// maxFile bounds what is read of any one file.
const maxFile = 32 << 20

// folder is data_dir as it was when it was opened, with its lock held.
type folder struct {
	path string
	root *os.Root
	lock *os.File
}

// openFolder opens the folder at path, makes it when it is missing, and takes
// its lock.
func openFolder(path string) (_ *folder, err error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder: %w", err)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
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
	// Whoever owns the folder can replace the key in it.
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%s belongs to user %d and this process runs as %d: chown it, or run as its owner", path, st.Uid, os.Geteuid())
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := root.Chmod(".", 0o700); err != nil {
			return nil, fmt.Errorf("%s can be read by others (mode %v): chmod it to 0700: %w", path, info.Mode().Perm(), err)
		}
	}
	f.lock, err = root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, syscall.EROFS) {
		// A disk with errors is often mounted again to be read only. What it
		// holds is enough for a start.
		f.lock, err = root.Open(lockFile)
	}
	if err != nil {
		return nil, fmt.Errorf("open the lock file: %w", err)
	}
	if err := syscall.Flock(int(f.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another agent: stop that one, or give this one a folder of its own", path)
		}
		return nil, fmt.Errorf("lock %s: %w", f.name(lockFile), err)
	}
	return f, nil
}

// close gives the folder free.
func (f *folder) close() error {
	var errs []error
	if f.lock != nil {
		// Closing alone would leave the lock with a child process that has
		// been forked and not yet executed, which shares the open file.
		errs = append(errs, syscall.Flock(int(f.lock.Fd()), syscall.LOCK_UN), f.lock.Close())
	}
	return errors.Join(append(errs, f.root.Close())...)
}

// current reports whether the path still leads to this folder, and the name of
// the lock to the lock that is held.
func (f *folder) current() bool {
	return same(func() (fs.FileInfo, error) { return os.Stat(f.path) }, func() (fs.FileInfo, error) { return f.root.Stat(".") }) &&
		same(func() (fs.FileInfo, error) { return f.root.Stat(lockFile) }, f.lock.Stat)
}

func same(a, b func() (fs.FileInfo, error)) bool {
	x, errX := a()
	y, errY := b()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// access returns an error when nothing can be written here, as far as that can
// be told without writing: the permissions, and a read-only mount.
func (f *folder) access() error {
	if err := unix.Faccessat(unix.AT_FDCWD, f.path, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return &fs.PathError{Op: "write to", Path: f.path, Err: err}
	}
	return nil
}

func (f *folder) name(file string) string { return filepath.Join(f.path, file) }

// stamp tells one content of a file from another without reading it. The zero
// stamp is that of no file.
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

// read returns the content of a file, nil when it does not exist.
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
			return nil, stamp{}, fmt.Errorf("%s can be read by others (mode %v): chmod it to 0600: %w", f.name(file), info.Mode().Perm(), err)
		}
		if info, err = r.Stat(); err != nil {
			return nil, stamp{}, err
		}
	}
	b, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, stamp{}, fmt.Errorf("read %s: %w", f.name(file), err)
	}
	if len(b) > maxFile {
		return nil, stamp{}, fmt.Errorf("%s is larger than %d bytes: it is not a file that the agent wrote", f.name(file), maxFile)
	}
	return b, stampOf(info), nil
}

// write replaces a file: after a crash at any moment it holds either the old
// content or the new.
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

// writeTemp writes a new file and has it on disk when it returns. What a crash
// left under that name is removed, because its permissions are unknown.
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
			err = errors.Join(fmt.Errorf("write %s: %w", f.name(file), err), f.root.Remove(file))
		}
	}()
	if _, err := w.Write(b); err != nil {
		return err
	}
	return w.Sync()
}

// remove deletes a file; it is no error when there is none.
func (f *folder) remove(file string) error {
	if err := f.root.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.sync()
}

// probe checks that an identity could be saved now, by doing all of it but the
// last step.
func (f *folder) probe() error {
	const file = identityFile + ".probe"
	if err := f.writeTemp(file, make([]byte, 16<<10)); err != nil {
		return err
	}
	return f.root.Remove(file)
}

// setAside renames a file, so that it is out of the way and nothing is lost,
// and returns where it is now.
func (f *folder) setAside(file, why string, now time.Time) (string, error) {
	to := file + "." + why + "-" + now.UTC().Format("20060102T150405.000000000Z")
	if err := f.root.Rename(file, to); err != nil {
		return "", err
	}
	return f.name(to), f.sync()
}

// sync makes a rename last (fsync(2): syncing a file does not sync the folder
// that names it).
func (f *folder) sync() error {
	d, err := f.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
