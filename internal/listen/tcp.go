package listen

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/renewd/renewd/internal/config"
)

// TCP listens on host:port. Its error names the remedy and, if the address is in use and
// this process may find out, the process that has it.
func TCP(address string) (net.Listener, error) {
	lis, err := net.Listen("tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		by := "the process that listens there (ss -ltnp shows it)"
		if holder := holderOf(address); holder != "" {
			by = holder + ", which listens there,"
		}
		return nil, fmt.Errorf("%w: stop %s or choose another address", err, by)
	case errors.Is(err, fs.ErrPermission):
		return nil, config.Permanent(fmt.Errorf("%w: choose a port from 1024 on, or give the program the capability CAP_NET_BIND_SERVICE", err))
	case err != nil:
		return nil, fmt.Errorf("%w: give host:port of this machine", err)
	}
	return lis, nil
}

// holderOf returns name and PID of a process that listens on the port of an address; "" if
// it is not found, such as that of another user, whose open files only root may see.
func holderOf(address string) string {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return ""
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return ""
	}
	sockets := listening(uint16(n))
	if len(sockets) == 0 {
		return ""
	}
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, file := range files {
		if target, err := os.Readlink(file); err == nil && sockets[target] {
			pid := strings.Split(file, "/")[2]
			name, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("%q (PID %s)", strings.TrimSpace(string(name)), pid)
		}
	}
	return ""
}

// listening returns the sockets that listen on a port, as the links of open files name
// them (proc(5), /proc/net/tcp: local address, state and inode are columns 2, 4 and 10).
func listening(port uint16) map[string]bool {
	out := make(map[string]bool)
	for _, table := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		data, _ := os.ReadFile(table)
		for line := range strings.Lines(string(data)) {
			column := strings.Fields(line)
			if len(column) >= 10 && column[3] == "0A" && strings.HasSuffix(column[1], fmt.Sprintf(":%04X", port)) {
				out["socket:["+column[9]+"]"] = true
			}
		}
	}
	return out
}
