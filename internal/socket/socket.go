// Package socket opens the Unix sockets of the programs, keeps their files in place, and connects
// to those of other programs.
package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/config"
)

// maxPath is the maximum length of a path in sockaddr_un, without the final NUL:
// unix(7).
const maxPath = 107

// Listen listens on the Unix socket at path with the given permissions. It creates a
// missing folder (0755) and replaces the socket file of a process that was killed. It
// fails if another process listens on the socket or the file is not a socket. Closing the
// listener removes the socket file. [Listener.Watch] keeps the file in place until then.
func Listen(path string, mode fs.FileMode) (*Listener, error) {
	if len(path) > maxPath {
		return nil, config.Permanent(fmt.Errorf("socket %s: the path has %d bytes, the maximum is %d: choose a shorter one",
			path, len(path), maxPath))
	}
	l := newListener(path, mode)
	if err := l.bind(); err != nil {
		return nil, err
	}
	return l, nil
}

// bind creates the socket file and a listener for it.
func bind(path string, mode fs.FileMode) (*net.UnixListener, fs.FileInfo, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, nil, config.FileError(fmt.Errorf("socket %s: create its folder: %w", path, err))
	}
	if err := removeStale(path); err != nil {
		return nil, nil, fmt.Errorf("socket %s: %w", path, err)
	}
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, listenError(path, err)
	}
	err = os.Chmod(path, mode)
	var file fs.FileInfo
	if err == nil {
		file, err = os.Lstat(path)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("socket %s: %w", path, err), lis.Close())
	}
	lis.SetUnlinkOnClose(false) // it would also remove a file that has replaced the socket
	return lis, file, nil
}

func listenError(path string, err error) error {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
		return config.FileError(fmt.Errorf("socket %s: %w: choose a folder that this program's user can write", path, err))
	}
	return fmt.Errorf("socket %s: %w", path, err)
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return config.Permanent(errors.New("there is a file that is not a socket: remove it or choose another path"))
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		defer conn.Close()
		other := "stop that process (ss -xlp shows it)"
		if pid := listener(conn); pid > 0 {
			name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			other = fmt.Sprintf("stop %q (PID %d)", strings.TrimSpace(string(name)), pid)
		}
		return errors.New("another process listens on it: " + other + " or choose another path")
	case errors.Is(err, syscall.ECONNREFUSED):
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the stale socket: %w", err)
		}
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("check whether another process listens on it: %w", err)
}

// isOurs reports whether this process listens on the socket at path.
func isOurs(path string) bool {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return false
	}
	defer conn.Close()
	return listener(conn) == os.Getpid()
}

// listener returns the PID of the process that listens on the socket to which conn is
// connected; 0 if that is not known.
func listener(conn net.Conn) (pid int) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		// The credentials are those of the process that called listen(2): unix(7).
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
