package system_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// ports returns n TCP ports of the loopback interface that are free now. They are below
// Linux's range for outgoing connections, because they must stay free until a script uses
// them.
func ports(n int) ([]string, error) {
	var out []string
	var last error
	for range 100 * n {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(22_000)))
		if err != nil {
			last = err
			continue
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		if out = append(out, port); len(out) == n {
			return out, nil
		}
	}
	return nil, fmt.Errorf("%d of %d ports: %w", len(out), n, last)
}

// run runs the scripts that match a pattern. In a script $R is a short path to
// its own folder, because a Unix socket's path has at most 107 bytes; $P1 to $P9
// are free ports; $SELF is this program, which can be a workload.
func run(t *testing.T, pattern string, extra map[string]string) {
	testscript.Run(t, testscript.Params{
		Files:               files(t, pattern),
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			short, err := os.MkdirTemp("", "rn")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(short) })
			r := filepath.Join(short, "r")
			if err := os.Symlink(env.WorkDir, r); err != nil {
				return err
			}
			free, err := ports(9)
			if err != nil {
				return err
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			env.Setenv("R", r)
			env.Setenv("SELF", self)
			env.Setenv("PATH", programs()+string(os.PathListSeparator)+os.Getenv("PATH"))
			env.Setenv("RENEWD_ADMIN_SOCKET", r+"/admin.sock")
			for i, p := range free {
				env.Setenv("P"+strconv.Itoa(i+1), p)
			}
			for k, v := range extra {
				env.Setenv(k, v)
			}
			env.Values[fleetKey{}] = &fleet{}
			env.Defer(func() { env.Values[fleetKey{}].(*fleet).stop() })
			followed := &streams{released: make(map[string]bool)}
			env.Values[streamsKey{}] = followed
			env.Defer(followed.stop)
			forwarding := &balancers{open: make(map[io.Closer]bool)}
			env.Values[balancersKey{}] = forwarding
			env.Defer(forwarding.stop)
			env.Values[stallsKey{}] = new([2]stalls)
			env.Values[scriptKey{}] = env.T()
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"alike":         alike,
			"applied":       applied,
			"documented":    documented,
			"pasted":        pasted,
			"expand":        expand,
			"until":         until,
			"keyset":        keysetVar,
			"capture":       capture,
			"spire-token":   spireToken,
			"trusts":        trusts,
			"workloads":     workloads,
			"streams":       followStreams,
			"authority":     authority,
			"settled":       settled,
			"synced":        synced,
			"balance":       balance,
			"stall":         stall,
			"spire-entries": spireEntries,
			"spire-entry":   spireEntry,
			"both":          bothEntryCommands,
			"differs":       differingEntryCommands,
			"tokens":        tokens,
			"held":          held,
			"unread":        unread,
			"paced":         paced,
			"pause":         signal(syscall.SIGSTOP),
			"resume":        signal(syscall.SIGCONT),
		},
	})
}

func files(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(found) == 0 {
		t.Fatalf("no script matches %s (%v)", pattern, err)
	}
	return found
}

// expand FILE... replaces $NAME in files by the script's variables.
func expand(ts *testscript.TestScript, neg bool, args []string) {
	for _, name := range args {
		path := ts.MkAbs(name)
		text := os.Expand(ts.ReadFile(path), ts.Getenv)
		ts.Check(os.WriteFile(path, []byte(text), 0o600))
	}
}

// applied [keysetctl flags] waits until every agent has applied the trust bundle: without
// it an agent cannot verify SVIDs of a new keyset.
func applied(ts *testscript.TestScript, neg bool, args []string) {
	deadline := time.Now().Add(5 * time.Minute)
	for {
		ts.Check(ts.Exec("keysetctl", append([]string{"list", "-o", "json"}, args...)...))
		var list struct {
			Agents int
			Behind int `json:"agents_behind"`
		}
		ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &list))
		if list.Agents > 0 && list.Behind == 0 {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("after five minutes %d of %d agents are behind", list.Behind, list.Agents)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// capture NAME sets a variable to the last command's output, without the
// white space around it.
func capture(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: capture NAME")
	}
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}

// spire-token FILE writes the join token that spire-server has just printed.
func spireToken(ts *testscript.TestScript, neg bool, args []string) {
	_, token, ok := strings.Cut(ts.ReadFile("stdout"), "Token: ")
	if !ok || len(args) != 1 {
		ts.Fatalf("usage: spire-token FILE, after spire-server token generate")
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.TrimSpace(token)), 0o600))
}

// trusts SOCKET TRUSTDOMAIN N waits until workloads at an agent's socket get N X.509
// authorities of a trust domain. An agent fetches federated bundles once a minute.
func trusts(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: trusts SOCKET TRUSTDOMAIN N")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	td, err := spiffeid.TrustDomainFromString(args[1])
	ts.Check(err)
	n := 0
	for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		set, err := workloadapi.FetchX509Bundles(ctx, workloadapi.WithAddr("unix://"+args[0]))
		if err != nil {
			continue // the agent starts, or the entry is not there yet
		}
		n = 0
		if b, ok := set.Get(td); ok {
			n = len(b.X509Authorities())
		}
		if strconv.Itoa(n) == args[2] {
			return
		}
	}
	ts.Fatalf("%d authorities of %s after five minutes, want %s", n, args[1], args[2])
}

// until COMMAND... repeats a command until it succeeds, or with ! until it fails, for at
// most five minutes.
func until(ts *testscript.TestScript, neg bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	for {
		err := ts.Exec(args[0], args[1:]...)
		if (err == nil) != neg {
			return
		}
		select {
		case <-ctx.Done():
			ts.Fatalf("%s: not within five minutes: %v", strings.Join(args, " "), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// keyset NAME STATE sets a variable to the ID of the only keyset in a state.
func keysetVar(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: keyset NAME STATE [keysetctl flags]")
	}
	ts.Check(ts.Exec("keysetctl", append([]string{"list", "-o", "json"}, args[2:]...)...))
	var list struct {
		Keysets []struct{ ID, State string }
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &list))
	var ids []string
	for _, k := range list.Keysets {
		if k.State == args[1] {
			ids = append(ids, k.ID)
		}
	}
	if len(ids) != 1 {
		ts.Fatalf("keysets in state %s: %v, want one", args[1], ids)
	}
	ts.Setenv(args[0], ids[0])
}

// signal returns a command that sends a signal to the background processes whose
// command line ends with its argument.
func signal(sig syscall.Signal) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if len(args) != 1 {
			ts.Fatalf("usage: pause|resume END-OF-COMMAND-LINE")
		}
		sent := 0
		for _, cmd := range ts.BackgroundCmds() {
			if line := strings.Join(cmd.Args, " "); strings.HasSuffix(line, args[0]) {
				ts.Check(cmd.Process.Signal(sig))
				sent++
				if sig == syscall.SIGSTOP {
					// A process that stays stopped could not be ended. No script stops one
					// for that long.
					time.AfterFunc(10*time.Minute, func() { cmd.Process.Signal(syscall.SIGCONT) })
				}
			}
		}
		if sent == 0 {
			ts.Fatalf("no background process ends with %q", args[0])
		}
	}
}

// workloads start SOCKET... starts a workload at each agent's socket. Each calls the next
// continuously over mutual TLS. After it
//
//	workloads fine      there are calls since the last check, and none failed
//	workloads failing   wait until calls fail
//	workloads recover   wait until there are calls for a second and none fails
func workloads(ts *testscript.TestScript, neg bool, args []string) {
	f := ts.Value(fleetKey{}).(*fleet)
	switch {
	case len(args) > 1 && args[0] == "start":
		ts.Check(f.start(args[1:]))
	case len(args) == 1 && args[0] == "fine":
		// The last check may have been a moment ago.
		deadline := time.Now().Add(time.Minute)
		calls, err := f.look()
		for ; err == nil && calls == 0 && time.Now().Before(deadline); calls, err = f.look() {
			time.Sleep(100 * time.Millisecond)
		}
		if err != nil || calls == 0 {
			ts.Fatalf("%d calls: %v", calls, err)
		}
		ts.Logf("%d calls, none failed", calls)
	case len(args) == 1 && (args[0] == "failing" || args[0] == "recover"):
		deadline := time.Now().Add(5 * time.Minute)
		for {
			time.Sleep(time.Second)
			calls, err := f.look()
			if (args[0] == "failing" && err != nil) || (args[0] == "recover" && err == nil && calls > 0) {
				return
			}
			if time.Now().After(deadline) {
				ts.Fatalf("%s: not within five minutes: %d calls, %v", args[0], calls, err)
			}
		}
	default:
		ts.Fatalf("usage: workloads start SOCKET... | fine | failing | recover")
	}
}

// The runbook, step by step, with renewd's server.
func TestRunbook(t *testing.T) {
	t.Parallel()
	run(t, "runbook.txtar", nil)
}

// An entry's DNS names, from the file to the workload.
func TestDNSNames(t *testing.T) {
	t.Parallel()
	run(t, "names.txtar", nil)
}

// Selectors of workloads, and the sockets.
func TestAttestation(t *testing.T) {
	t.Parallel()
	run(t, "attest.txtar", nil)
}

// Trouble in a rotation, each case provoked.
func TestTroubleshooting(t *testing.T) {
	t.Parallel()
	run(t, "trouble.txtar", nil)
}

// A server is lost and restored from a backup.
func TestRestore(t *testing.T) {
	t.Parallel()
	run(t, "restore.txtar", nil)
}

// The runbook with a real SPIRE server, and the agents' figures from a real Prometheus.
func TestRunbookUnderSPIRE(t *testing.T) {
	t.Parallel()
	path := withSPIRE(t)
	needPrometheus(t)
	run(t, "spire.txtar", path)
}

// A trust domain of a real SPIRE server and one of renewd trust each other.
func TestFederationWithSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-federation.txtar", withSPIRE(t))
}

// needPrometheus skips the test if Prometheus is not installed.
func needPrometheus(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("prometheus"); err != nil {
		t.Skip("install prometheus (Debian package prometheus) to run this test with a real one")
	}
}

// withSPIRE puts SPIRE's programs on a script's path, or skips the test.
func withSPIRE(t *testing.T) map[string]string {
	t.Helper()
	dir := os.Getenv("SPIRE_BIN_DIR")
	if dir == "" {
		t.Skip("set SPIRE_BIN_DIR to a folder with spire-server and spire-agent to run this test under a real SPIRE server")
	}
	return map[string]string{"PATH": strings.Join([]string{programs(), dir, os.Getenv("PATH")}, string(os.PathListSeparator))}
}
