package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/internal/listen"
)

// process is a caller at the admin socket: the user and the groups that the kernel recorded
// when it connected.
type process struct {
	uid  uint32
	gids []uint32
}

func (p process) actor() string { return "unix:uid:" + strconv.FormatUint(uint64(p.uid), 10) }

// processCredentials identify the process at the admin socket by the kernel, without TLS.
type processCredentials struct{}

// ServerHandshake reads the credentials that the process had when it connected
// (SO_PEERCRED and SO_PEERGROUPS, unix(7)). It does not use /proc, because the PID may be
// reused, nor the user database, because the process may have other groups.
func (processCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := identify(c)
	if err != nil {
		return nil, nil, fmt.Errorf("identify the caller: %w", err)
	}
	return c, processInfo{process: p}, nil
}

func identify(c net.Conn) (p process, err error) {
	u, ok := listen.Raw(c).(*net.UnixConn)
	if !ok {
		return p, fmt.Errorf("%T is no connection of a Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return p, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); failed != nil {
			return
		}
		p.uid = cred.Uid
		p.gids, failed = peerGroups(fd)
		p.gids = append(p.gids, cred.Gid)
	})
	return p, errors.Join(err, failed)
}

// peerGroups returns the supplementary groups of the peer process. There are none if the
// kernel does not support that.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups)) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(unsafe.SliceData(groups))), uintptr(unsafe.Pointer(&size)), 0)
		switch errno {
		case 0:
			return groups[:size/4], nil
		case unix.ERANGE: // size is now the size that is needed
			groups = make([]uint32, size/4)
		case unix.ENOPROTOOPT:
			return nil, nil
		default:
			return nil, errno
		}
	}
}

// ClientHandshake is not called.
func (processCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

// Info describes the protocol.
func (processCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone returns c, which has no state.
func (c processCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName is not called.
func (processCredentials) OverrideServerName(string) error { return nil }

type processInfo struct {
	credentials.CommonAuthInfo
	process process
}

// AuthType implements credentials.AuthInfo.
func (processInfo) AuthType() string { return "unix" }
