package docker_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
	"github.com/renewd/renewd/internal/agent/attest/docker"
	"github.com/renewd/renewd/internal/selector"
)

const (
	id    = "c0ffee0123456789abcdef0123456789abcdef0123456789abcdef0123456789"
	other = "0000000123456789abcdef0123456789abcdef0123456789abcdef0123456789"
)

// recorded is the answer of Docker Engine 20.10.24 (Debian 12) about a container, with
// other IDs and paths.
func recorded(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("testdata/docker-20.10.json")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// ofRecorded are the selectors of the recorded answer.
var ofRecorded = []string{
	"docker:label:com.example.name:foo", "docker:label:space label:a b:c=d", "docker:label:team:web",
	"docker:env:SECRET=hunter2", "docker:env:PATH=/bin", "docker:env:EMPTY=", "docker:env:MULTI=a=b:c",
	"docker:image_id:example.org/app:1", "docker:image_config_digest:sha256:" + strings.Repeat("5eed", 16),
}

// serve is an engine at a socket that answers about the container with the ID. It returns
// the socket's path and the number of requests about containers.
func serve(t *testing.T, version string, answer http.HandlerFunc) (path string, asked *atomic.Int32) {
	t.Helper()
	path, asked = filepath.Join(t.TempDir(), "s"), new(atomic.Int32)
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", version) })
	mux.HandleFunc("GET /v"+version+"/containers/{id}/json", func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Header().Set("Content-Type", "application/json")
		if r.PathValue("id") != id {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"message":"No such container: %s"}`, r.PathValue("id"))
			return
		}
		answer(w, r)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"message":"%s is not a supported version"}`, r.URL.Path)
	})
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(lis) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return path, asked
}

func says(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) }
}

func in(c cgroup.Container) func(*attest.Peer) (cgroup.Container, error) {
	return func(*attest.Peer) (cgroup.Container, error) { return c, nil }
}

func attestWith(t *testing.T, ctx context.Context, cfg docker.Config) ([]string, error) {
	t.Helper()
	p, err := attest.FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	a := docker.New(cfg)
	s, err := a.Attest(ctx, p)
	return text(s), err
}

func text(selectors []cache.Selector) []string {
	var out []string
	for _, s := range selectors {
		out = append(out, s.String())
	}
	return out
}

// Each container is looked up at its own engine only, and those of other runtimes at none.
func TestEngineOfContainer(t *testing.T) {
	t.Parallel()
	if err := selector.Compare("docker", ofRecorded); err != nil {
		t.Error(err)
	}
	me := uint32(os.Geteuid())
	if me == 0 {
		me = 1 // root is no user of a rootless engine
	}
	for name, tt := range map[string]struct {
		container cgroup.Container
		want      string // the engine that answers
		err       string
	}{
		"no container":                     {cgroup.Container{}, "", ""},
		"Docker":                           {cgroup.Container{ID: id, Runtime: "docker"}, "docker", ""},
		"Docker under another parent":      {cgroup.Container{ID: id}, "docker", ""},
		"Podman as root":                   {cgroup.Container{ID: id, Runtime: "libpod"}, "podman", ""},
		"containerd":                       {cgroup.Container{ID: id, Runtime: "cri-containerd", Pod: true}, "", ""},
		"CRI-O":                            {cgroup.Container{ID: id, Runtime: "crio", Pod: true}, "", ""},
		"not Docker's":                     {cgroup.Container{ID: other, Pod: true}, "", ""},
		"Docker's, removed":                {cgroup.Container{ID: other, Runtime: "docker"}, "", "does not know container " + other},
		"Podman's, removed":                {cgroup.Container{ID: other, Runtime: "libpod"}, "", "does not know container " + other},
		"a user's Docker":                  {cgroup.Container{ID: id, Runtime: "docker", User: me}, "", ""},
		"a user's group with such a name":  {cgroup.Container{ID: id, User: me}, "", ""},
		"a user's Podman, socket of other": {cgroup.Container{ID: id, Runtime: "libpod", User: me + 1}, "", "not user " + fmt.Sprint(me+1)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dockerSocket, dockerAsked := serve(t, "1.41", says(recorded(t)))
			podmanSocket, podmanAsked := serve(t, "1.41", says(strings.ReplaceAll(recorded(t), "hunter2", "podman")))
			userSocket, _ := serve(t, "1.41", says(recorded(t)))
			template := filepath.Join(t.TempDir(), "%d.sock")
			if err := os.Symlink(userSocket, fmt.Sprintf(template, tt.container.User)); err != nil {
				t.Fatal(err)
			}
			got, err := attestWith(t, t.Context(), docker.Config{Socket: dockerSocket, Podman: podmanSocket, RootlessPodman: template, Container: in(tt.container)})
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			want := map[string][]string{"docker": ofRecorded, "podman": slices.Clone(ofRecorded)}[tt.want]
			if tt.want == "podman" {
				want[3] = "docker:env:SECRET=podman"
			}
			if !slices.Equal(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			if tt.container.User != 0 && dockerAsked.Load()+podmanAsked.Load() > 0 {
				t.Error("an engine of the system was asked about a user's control group")
			}
		})
	}
}

// A user's Podman is asked at the user's socket, and only if that is configured.
func TestRootlessPodman(t *testing.T) {
	t.Parallel()
	uid := uint32(os.Geteuid())
	path, _ := serve(t, "1.41", says(recorded(t)))
	template := filepath.Join(t.TempDir(), "100%%", "%d")
	link := filepath.Join(filepath.Dir(filepath.Dir(template)), "100%", fmt.Sprint(uid))
	if err := os.Mkdir(filepath.Dir(link), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if uid == 0 {
		t.Skip("root's containers are not rootless")
	}
	of := in(cgroup.Container{ID: id, Runtime: "libpod", User: uid})
	if got, err := attestWith(t, t.Context(), docker.Config{Container: of}); err != nil || got != nil {
		t.Errorf("not configured: %q, %v", got, err)
	}
	if got, err := attestWith(t, t.Context(), docker.Config{RootlessPodman: template, Container: of}); err != nil || !slices.Equal(got, ofRecorded) {
		t.Errorf("got %q, %v", got, err)
	}
}

// A service with Delegate= can make a control group that has the name of a container. It
// gets nothing of that container, which is elsewhere.
func TestForgedNameBelowService(t *testing.T) {
	t.Parallel()
	first := exec.Command("sleep", "60")
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	defer first.Wait()
	defer first.Process.Kill()
	path := func(service string) cgroup.Container {
		return cgroup.Container{ID: id, Runtime: "libpod", Path: "/system.slice/" + service + ".service/libpod-payload-" + id}
	}
	answer := func(pid int) string {
		return regexp.MustCompile(`"Pid": *[0-9]+`).ReplaceAllString(recorded(t), fmt.Sprintf(`"Pid":%d`, pid))
	}
	for name, tt := range map[string]struct {
		first cgroup.Container
		pid   int
		want  string
	}{
		"in the container":         {path("web"), first.Process.Pid, ""},
		"in another service":       {path("db"), first.Process.Pid, "which is in another one"},
		"in the container's scope": {cgroup.Container{ID: id, Runtime: "libpod"}, first.Process.Pid, "which is in another one"},
		"in no container":          {cgroup.Container{}, first.Process.Pid, "which is in another one"},
		"stopped":                  {path("web"), 0, "does not run"},
		"ended":                    {path("web"), 1 << 30, "has exited"},
	} {
		t.Run(name, func(t *testing.T) {
			podman, _ := serve(t, "1.41", says(answer(tt.pid)))
			got, err := attestWith(t, t.Context(), docker.Config{Podman: podman, Container: func(p *attest.Peer) (cgroup.Container, error) {
				if p.PID() == os.Getpid() {
					return path("web"), nil
				}
				return tt.first, nil
			}})
			if tt.want == "" {
				if err != nil || !slices.Equal(got, ofRecorded) {
					t.Errorf("got %q, %v", got, err)
				}
			} else if got != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, %v, want an error with %q", got, err, tt.want)
			}
		})
	}
}

// serveAs is an engine of another user that never answers about containers. The user of a
// socket is that of the thread that listens.
func serveAs(t *testing.T, uid uint32) (path string, asked chan struct{}) {
	t.Helper()
	path, asked = filepath.Join(t.TempDir(), "s"), make(chan struct{}, 100)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	if err != nil {
		t.Fatal(err)
	}
	listened := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		_, _, failed := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid))
		if failed == 0 {
			listened <- unix.Listen(fd, 100)
			return
		}
		listened <- failed
	}()
	if err := <-listened; err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), path)
	lis, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			w.Header().Set("Api-Version", "1.41")
			return
		}
		asked <- struct{}{}
		<-r.Context().Done()
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(lis) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return path, asked
}

// A user whose Podman does not answer takes no more than a few of the calls that run
// for all users.
func TestHangingPodmanOfOneUser(t *testing.T) {
	t.Parallel()
	const user = 12345
	if os.Geteuid() != 0 {
		t.Skip("needs root to listen as a user")
	}
	hanging, asked := serveAs(t, user)
	system, _ := serve(t, "1.41", says(recorded(t)))
	template := filepath.Join(t.TempDir(), "%d")
	if err := os.Symlink(hanging, fmt.Sprintf(template, user)); err != nil {
		t.Fatal(err)
	}
	p, err := attest.FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var ofUser atomic.Bool
	ofUser.Store(true)
	a := attest.Limit(docker.New(docker.Config{Socket: system, RootlessPodman: template, Container: func(*attest.Peer) (cgroup.Container, error) {
		if ofUser.Load() {
			return cgroup.Container{ID: id, Runtime: "libpod", User: user}, nil
		}
		return cgroup.Container{ID: id, Runtime: "docker"}, nil
	}}), time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	defer callers.Wait()
	defer cancel()
	rejected := make(chan error, 100)
	for range 50 {
		callers.Go(func() {
			_, err := a.Attest(ctx, p)
			rejected <- err
		})
	}
	for range 4 {
		<-asked
	}
	for range 46 {
		select {
		case err := <-rejected:
			if err == nil || !strings.Contains(err.Error(), "Podman of user 12345") {
				t.Fatalf("got %v", err)
			}
		case <-asked:
			t.Fatal("the user's Podman has more than 4 calls")
		}
	}
	ofUser.Store(false)
	if got, err := a.Attest(t.Context(), p); err != nil || !slices.Equal(text(got), ofRecorded) {
		t.Errorf("another container: %q, %v", got, err)
	}
}

// Whatever an engine answers, there are either its selectors or an error that says why not.
func TestBadAnswers(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"garbage":            {says("<html>"), "invalid character"},
		"cut short":          {says(recorded(t)[:1000]), "unexpected EOF"},
		"empty":              {says(""), "EOF"},
		"another container":  {says(strings.ReplaceAll(recorded(t), id, other)), "not the description of this container"},
		"no configuration":   {says(`{"Id":"` + id + `"}`), "not the description of this container"},
		"too long":           {says(`{"Id":"` + strings.Repeat("x", 5<<20) + `"}`), "more than 4194304 bytes"},
		"endless whitespace": {says(strings.Repeat(" ", 5<<20)), "more than 4194304 bytes"},
		"error of the engine": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			io.WriteString(w, `{"message":"the store is damaged"}`)
		}, "the store is damaged"},
		"long error": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			io.WriteString(w, `{"message":"the store is `+strings.Repeat("x", 900_000)+`"}`)
		}, "the store is xxx"},
		"too new an engine": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			io.WriteString(w, `{"message":"client version 1.41 is too old"}`)
		}, "client version 1.41 is too old"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, _ := serve(t, "1.41", tt.answer)
			got, err := attestWith(t, t.Context(), docker.Config{Socket: path, Container: in(cgroup.Container{ID: id, Runtime: "docker"})})
			if got != nil || err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), id) || len(err.Error()) > 1000 {
				t.Errorf("got %q, %.1000v, want an error with %q", got, err, tt.want)
			}
		})
	}
}

func TestNoEngine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	lis, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	lis.(*net.UnixListener).SetUnlinkOnClose(false)
	lis.Close()
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "does not exist: start the engine",
		stale:                      "nobody listens: start the engine",
	} {
		_, err := attestWith(t, t.Context(), docker.Config{Socket: path, Container: in(cgroup.Container{ID: id, Runtime: "docker"})})
		if err == nil || !strings.Contains(err.Error(), "socket "+path+" ") && !strings.Contains(err.Error(), "socket "+path+":") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
		if err := docker.Reach(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Reach %s: %v, want %q", path, err, want)
		}
	}
}

// An engine that hangs delays the caller until its deadline.
func TestHangingEngine(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	path, _ := serve(t, "1.41", func(http.ResponseWriter, *http.Request) { <-release })
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := attestWith(t, ctx, docker.Config{Socket: path, Container: in(cgroup.Container{ID: id, Runtime: "docker"})}); err == nil {
		t.Error("no error")
	}
}

// After an engine was replaced by another version, the version is negotiated again.
func TestUpgradedEngine(t *testing.T) {
	t.Parallel()
	p, err := attest.FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	before, _ := serve(t, "1.41", says(recorded(t)))
	after, _ := serve(t, "1.52", says(recorded(t)))
	path := filepath.Join(t.TempDir(), "link")
	a := docker.New(docker.Config{Socket: path, Container: in(cgroup.Container{ID: id})})
	for _, target := range []string{before, after} {
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
		var got []cache.Selector
		for range 3 {
			if got, err = a.Attest(t.Context(), p); len(got) > 0 {
				break
			}
		}
		if !slices.Equal(text(got), ofRecorded) {
			t.Errorf("got %q, %v", got, err)
		}
		os.Remove(path)
	}
}

func TestCheckTemplate(t *testing.T) {
	t.Parallel()
	for template, ok := range map[string]bool{
		"/run/user/%d/podman/podman.sock": true, "/100%%/%d": true, "/%%%d": true,
		"/run": false, "/%d/%d": false, "/%s": false, "/%d%": false, "/%%d": false, "": false,
	} {
		if err := docker.CheckTemplate(template); (err == nil) != ok {
			t.Errorf("%q: %v", template, err)
		}
	}
}
