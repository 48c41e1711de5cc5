package admin_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/admin"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/unix"
)

// TestMain also makes the test binary a client: it asks the socket in RENEWD_TEST_SOCKET
// about process 1.
func TestMain(m *testing.M) {
	if socket := os.Getenv("RENEWD_TEST_SOCKET"); socket != "" {
		_, err := admin.Ask(context.Background(), socket, 1)
		fmt.Print(err)
		return
	}
	os.Exit(m.Run())
}

type fake struct {
	name      string
	selectors []cache.Selector
	err       error
}

func (f fake) Name() string { return f.name }
func (f fake) Attest(context.Context, *attest.Peer) ([]cache.Selector, error) {
	return f.selectors, f.err
}

func sel(text string) cache.Selector {
	typ, value, _ := strings.Cut(text, ":")
	return cache.Selector{Type: typ, Value: value}
}

func entry(id string, selectors ...string) *cache.Entry {
	e := &cache.Entry{ID: id, SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/" + id), Hint: "h-" + id}
	for _, s := range selectors {
		e.Selectors = append(e.Selectors, sel(s))
	}
	return e
}

// serve serves an admin socket and returns its path and its log.
func serve(t *testing.T, attestors []attest.Attestor, entries ...*cache.Entry) (socket string, log *bytes.Buffer) {
	t.Helper()
	c := cache.New(cache.Config{})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if authority, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	own, err := bundle.New(spiffeid.RequireTrustDomainFromString("example.org"), bundle.Content{X509: []bundle.X509Authority{{Certificate: authority}}})
	if err != nil {
		t.Fatal(err)
	}
	c.SetBundle(&bundle.Snapshot{Own: own})
	if entries != nil {
		c.Update(entries, nil)
	}
	// Not t.TempDir: other users have to reach it.
	dir, err := os.MkdirTemp("", "admin")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	lis, err := net.Listen("unix", socket)
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o666))
	}
	if err != nil {
		t.Fatal(err)
	}
	log = &bytes.Buffer{}
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		s := admin.New(admin.Config{Attestors: attestors, Cache: c, Log: slog.New(slog.NewTextHandler(log, nil))})
		if err := s.Serve(ctx, lis); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); done.Wait() })
	return socket, log
}

func TestAttest(t *testing.T) {
	t.Parallel()
	one := fake{name: "unix", selectors: []cache.Selector{sel("unix:uid:5"), sel("unix:gid:6")}}
	two := fake{name: "docker", selectors: []cache.Selector{sel("docker:env:A=\x01")}}
	down := fake{name: "docker", err: errors.New("engine is down")}
	for name, tt := range map[string]struct {
		attestors []attest.Attestor
		entries   []*cache.Entry
		outcome   string
		matched   []string
		near      []string
	}{
		"entries that match": {[]attest.Attestor{one, two}, []*cache.Entry{entry("b", "unix:uid:5"), entry("a", "unix:gid:6", "docker:env:A=\x01"), entry("c", "unix:uid:6", "unix:gid:7")},
			admin.Matched, []string{"a", "b"}, nil},
		"the nearest first": {[]attest.Attestor{one, two}, []*cache.Entry{entry("a", "unix:uid:6"), entry("b", "unix:uid:5", "unix:gid:7"), entry("c", "unix:uid:5", "unix:gid:6", "docker:env:B=1"), entry("d", "k8s:ns:x", "k8s:sa:x")},
			admin.Denied, nil, []string{"c lacks docker:env:B=1", "b lacks unix:gid:7", "a lacks unix:uid:6"}},
		"a failed attestor may matter": {[]attest.Attestor{one, down}, []*cache.Entry{entry("a", "unix:uid:5", "docker:label:x:y")},
			admin.Unavailable, nil, []string{"a lacks docker:label:x:y"}},
		"a failed attestor does not matter": {[]attest.Attestor{one, down}, []*cache.Entry{entry("a", "unix:uid:6", "docker:label:x:y")}, admin.Denied, nil, nil},
		"before the first sync":             {[]attest.Attestor{one}, nil, admin.Starting, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket, _ := serve(t, tt.attestors, tt.entries...)
			got, err := admin.Ask(t.Context(), socket, os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			exe, _ := os.Executable()
			if got.PID != os.Getpid() || int(got.UID) != os.Geteuid() || int(got.GID) != os.Getegid() || got.Path != exe || got.Outcome != tt.outcome {
				t.Errorf("got %+v, want %s", got, tt.outcome)
			}
			var matched, near []string
			for _, e := range got.Entries {
				matched = append(matched, e.ID)
				if e.SPIFFEID != "spiffe://example.org/"+e.ID || e.Hint != "h-"+e.ID {
					t.Errorf("entry %+v", e)
				}
			}
			for _, e := range got.NearMisses {
				near = append(near, e.ID+" lacks "+e.Lacks)
			}
			if !reflect.DeepEqual(matched, tt.matched) || !reflect.DeepEqual(near, tt.near) {
				t.Errorf("matched %q, near %q; want %q, %q", matched, near, tt.matched, tt.near)
			}
			for i, f := range got.Attestors {
				want := tt.attestors[i].(fake)
				if f.Name != want.name || len(f.Selectors) != len(want.selectors) || (f.Error == "") != (want.err == nil) || f.Milliseconds < 0 {
					t.Errorf("attestor %+v, want %+v", f, want)
				}
				for k, s := range f.Selectors {
					if s != want.selectors[k].String() {
						t.Errorf("selector %q, want %q", s, want.selectors[k])
					}
				}
			}
		})
	}
}

func TestManyNearMisses(t *testing.T) {
	t.Parallel()
	var entries []*cache.Entry
	for i := range 50 {
		entries = append(entries, entry(strconv.Itoa(i), "unix:uid:"+strconv.Itoa(1000+i)))
	}
	socket, _ := serve(t, []attest.Attestor{fake{name: "unix"}}, entries...)
	got, err := admin.Ask(t.Context(), socket, os.Getpid())
	if err != nil || len(got.NearMisses) != 20 || got.MoreNearMisses != 30 {
		t.Errorf("got %+v, %v", got, err)
	}
}

// The real attestor finds what belongs to the process that is named, not to the one that asks.
func TestProcessOfAnotherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 4712}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	processes := unix.New(unix.Config{})
	defer processes.Close()
	socket, _ := serve(t, []attest.Attestor{processes}, entry("a", "unix:uid:4711", "unix:gid:4712"))
	got, err := admin.Ask(t.Context(), socket, cmd.Process.Pid)
	if err != nil || got.UID != 4711 || got.GID != 4712 || got.Outcome != admin.Matched {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestNoSuchProcess(t *testing.T) {
	t.Parallel()
	socket, _ := serve(t, []attest.Attestor{fake{name: "unix"}})
	for pid, want := range map[int]string{1 << 30: "there is no process 1073741824", 0: "not a positive number", -1: "not a positive number"} {
		if _, err := admin.Ask(t.Context(), socket, pid); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("PID %d: %v, want %q", pid, err, want)
		}
	}
	if _, err := admin.Ask(t.Context(), filepath.Join(t.TempDir(), "none"), 1); err == nil || !strings.Contains(err.Error(), "no agent is listening") {
		t.Errorf("without an agent: %v", err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }}}
	defer client.CloseIdleConnections()
	for _, query := range []string{"", "?pid=", "?pid=x", "?pid=1e3", "?pid=" + strings.Repeat("9", 40)} {
		resp, err := client.Get("http://agent/attest" + query)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", query, resp.Status)
		}
	}
}

// Nobody but root on the node is answered, whatever the mode of the socket file.
func TestCallerRejected(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		as   syscall.SysProcAttr
		want string
	}{
		"another user":             {syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 0}}, "user 4711 may not use the admin socket: run the command as root"},
		"root in a PID namespace":  {syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, "PID namespace of its own"},
		"root of a user namespace": {syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, Credential: &syscall.Credential{}, UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1}}, GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1}}}, "user 100000 may not use the admin socket"},
		"root":                     {syscall.SysProcAttr{}, "<nil>"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket, log := serve(t, []attest.Attestor{fake{name: "unix"}})
			program := filepath.Join(filepath.Dir(socket), "client")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			// By another process: a child of another test, started while this one has the file
			// open for writing, would keep it from being run (execve(2), ETXTBSY).
			if out, err := exec.CommandContext(ctx, "cp", exe, program).CombinedOutput(); err != nil {
				t.Fatalf("copy the test binary: %v: %s", err, out)
			}
			cmd := exec.CommandContext(ctx, program)
			cmd.Env = []string{"RENEWD_TEST_SOCKET=" + socket}
			cmd.Dir = "/"
			as := tt.as
			cmd.SysProcAttr = &as
			out, err := cmd.CombinedOutput()
			if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) {
				t.Skipf("no such namespace here: %v", err)
			}
			if err != nil || !strings.Contains(string(out), tt.want) {
				t.Errorf("got %q, %v, want %q", out, err, tt.want)
			}
			if rejected := strings.Contains(log.String(), "caller of the admin socket rejected"); rejected != (tt.want != "<nil>") {
				t.Errorf("logged %q", log)
			}
		})
	}
}
