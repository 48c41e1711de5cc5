package system_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// A nested SPIRE server: changes of the root's authorities reach the agents below.
func TestNestedSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-nested.txtar", withSPIRE(t))
}

// Two trust domains of SPIRE servers whose bundles are exchanged by hand.
func TestFederationByHandUnderSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-bundle-set.txtar", withSPIRE(t))
}

// Two SPIRE servers on one database, of which one lags and is stopped for a
// while, behind a balancer that alternates.
func TestTwoServersOnOneDatabase(t *testing.T) {
	t.Parallel()
	env := withSPIRE(t)
	env["DATABASE"] = postgres(t)
	run(t, "spire-two.txtar", env)
}

// Two SPIRE servers on one database are rotated as one, with the figures from a real
// Prometheus.
func TestRotateTwoServers(t *testing.T) {
	t.Parallel()
	env := withSPIRE(t)
	needPrometheus(t)
	env["DATABASE"] = postgres(t)
	run(t, "spire-rotate.txtar", env)
}

// A cluster is rotated while one server is frozen for a minute and then replaced. This
// takes some minutes, so it is not part of all tests.
func TestReplacedServer(t *testing.T) {
	if os.Getenv("SPIRE_CLUSTER_TEST") == "" {
		t.Skip("run make test-spire for this test, which takes some minutes")
	}
	t.Parallel()
	env := withSPIRE(t)
	needPrometheus(t)
	env["DATABASE"] = postgres(t)
	run(t, "spire-cluster.txtar", env)
}

// postgres starts a PostgreSQL server with a database and returns its connection string.
func postgres(t *testing.T) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Skip("install PostgreSQL (Debian package postgresql) to run this test with two servers on one database")
	}
	programs := filepath.Dir(found[len(found)-1])
	dir, err := os.MkdirTemp("", "pg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	// PostgreSQL does not run as root.
	as := &syscall.SysProcAttr{}
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Skipf("PostgreSQL does not run as root: %v", err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
		as.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	free, err := ports(1)
	if err != nil {
		t.Fatal(err)
	}
	command := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(programs, name), args...)
		cmd.Dir, cmd.SysProcAttr = dir, as
		return cmd
	}
	if out, err := command("initdb", "-D", dir+"/data", "-U", "spire", "-A", "trust", "--no-sync").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	server := command("postgres", "-D", dir+"/data", "-k", dir, "-h", "127.0.0.1", "-p", free[0], "-F")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(syscall.SIGQUIT) // ends it and its children at once
		_ = server.Wait()
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		out, err := command("createdb", "-h", "127.0.0.1", "-p", free[0], "-U", "spire", "spire").CombinedOutput()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no database within a minute: %v\n%s", err, out)
		}
	}
	return fmt.Sprintf("host=127.0.0.1 port=%s user=spire dbname=spire sslmode=disable", free[0])
}

// authority NAME TYPE STATE SOCKET sets a variable to the ID of the authority
// that SPIRE calls active, prepared or old.
func authority(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 4 {
		ts.Fatalf("usage: authority NAME x509|jwt active|prepared|old SOCKET")
	}
	ts.Check(ts.Exec("spire-server", "localauthority", args[1], "show", "-socketPath", args[3], "-output", "json"))
	var state map[string]struct {
		ID string `json:"authority_id"`
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &state))
	if state[args[2]].ID == "" {
		ts.Fatalf("no %s authority is %s", args[1], args[2])
	}
	ts.Setenv(args[0], state[args[2]].ID)
}

// synced N PORT... waits until each of the agents with their metrics on these ports has
// synced its entries N more times.
func synced(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: synced N PORT...")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	for _, port := range args[1:] {
		first, err := syncs(port)
		ts.Check(err)
		for deadline := time.Now().Add(waitLimit); ; time.Sleep(100 * time.Millisecond) {
			now, err := syncs(port)
			ts.Check(err)
			if now >= first+n {
				break
			}
			if time.Now().After(deadline) {
				ts.Fatalf("the agent of port %s has synced %d times within %v, not %d", port, now-first, waitLimit, n)
			}
		}
	}
}

// syncs returns the number of an agent's successful syncs, from its metrics.
func syncs(port string) (int, error) {
	resp, err := http.Get("http://127.0.0.1:" + port + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	found := regexp.MustCompile(`(?m)^renewd_sync_duration_seconds_count\{.*outcome="ok".*\} (\d+)$`).FindSubmatch(body)
	if found == nil {
		return 0, nil // none yet
	}
	return strconv.Atoi(string(found[1]))
}

type balancersKey struct{}

// connectionLife is how long a balancer keeps a connection. It is short, because a client
// stays with its server until then. The first connection has longer: an agent attests on
// it, and a join token whose answer is lost cannot be used again.
const (
	connectionLife = 2 * time.Second
	joinLife       = time.Minute
)

// balancers forward connections.
type balancers struct {
	mu     sync.Mutex
	closed bool
	open   map[io.Closer]bool
	work   sync.WaitGroup
}

// hold keeps a closer until it is forgotten or all are closed.
func (b *balancers) hold(c io.Closer) (ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		_ = c.Close()
		return false
	}
	b.open[c] = true
	return true
}

func (b *balancers) drop(c io.Closer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.open, c)
	_ = c.Close()
}

func (b *balancers) stop() {
	b.mu.Lock()
	b.closed = true
	for c := range b.open {
		_ = c.Close()
	}
	b.mu.Unlock()
	b.work.Wait()
}

// route is how a connection is forwarded.
type route struct {
	life        time.Duration             // until it is closed; zero means never
	there, back func(io.Reader) io.Reader // wrap the readers of both directions; nil means none
}

func (b *balancers) start(port string, targets []string, r route) error {
	lis, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		return err
	}
	if !b.hold(lis) {
		return net.ErrClosed
	}
	b.work.Go(func() {
		for n := 0; ; n++ {
			in, err := lis.Accept()
			if err != nil {
				return
			}
			r := r
			if n == 0 && r.life > 0 {
				r.life = joinLife
			}
			b.work.Go(func() { b.forward(in, targets[n%len(targets)], r) })
		}
	})
	return nil
}

func (b *balancers) forward(in net.Conn, target string, r route) {
	if !b.hold(in) {
		return
	}
	defer b.drop(in)
	out, err := net.DialTimeout("tcp", "127.0.0.1:"+target, connectionLife)
	if err != nil || !b.hold(out) {
		return
	}
	defer b.drop(out)
	if r.life > 0 {
		end := time.Now().Add(r.life)
		_ = in.SetDeadline(end)
		_ = out.SetDeadline(end)
	}
	there, back := io.Reader(in), io.Reader(out)
	if r.there != nil {
		there, back = r.there(in), r.back(out)
	}
	var answers sync.WaitGroup
	answers.Go(func() {
		_, _ = io.Copy(in, back)
		_ = in.Close()
	})
	_, _ = io.Copy(out, there)
	_ = out.Close()
	answers.Wait()
}

// balance PORT TARGET... forwards the connections of a port to the targets in turn, and
// closes each after connectionLife.
func balance(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: balance PORT TARGET...")
	}
	ts.Check(ts.Value(balancersKey{}).(*balancers).start(args[0], args[1:], route{life: connectionLife}))
}
