package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/test/runbooktest"
)

// harness runs keysetctl against a server in memory.
type harness struct {
	t      *testing.T
	server *runbooktest.Server
	env    map[string]string
	ctx    context.Context // of the commands; nil: the test's
	target target          // of the last command
	ids    []string        // pairs: a keyset's real ID and its alias
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	d := &harness{t: t, server: runbooktest.NewServer(t), env: map[string]string{}}
	d.alias(d.server.Deployment.Active().ID, "ks_abc1234xyz")
	return d
}

// alias replaces a keyset's ID by a fixed one, in command lines and output.
func (d *harness) alias(id, name string) { d.ids = append(d.ids, id, name) }

func (d *harness) run(line string) (code int, stdout, stderr string) {
	d.t.Helper()
	return d.runArgs(strings.Fields(line))
}

// runArgs is run for arguments that may be empty.
func (d *harness) runArgs(args []string) (code int, stdout, stderr string) {
	d.t.Helper()
	var fromAlias []string
	for i := 0; i < len(d.ids); i += 2 {
		fromAlias = append(fromAlias, d.ids[i+1], d.ids[i])
	}
	toReal := strings.NewReplacer(fromAlias...)
	args = slices.Clone(args)
	for i := range args {
		args[i] = toReal.Replace(args[i])
	}
	var out, errs bytes.Buffer
	connect := func(_ context.Context, t target) (runbook.Backend, io.Closer, error) {
		d.target = t
		return d.server, io.NopCloser(nil), nil
	}
	ctx := d.ctx
	if ctx == nil {
		ctx = d.t.Context()
	}
	code = run(ctx, args, func(name string) string { return d.env[name] }, strings.NewReader(""), &out, &errs, connect)
	toAlias := strings.NewReplacer(d.ids...)
	return code, toAlias.Replace(out.String()), toAlias.Replace(errs.String())
}

// expect runs a command line that must succeed and print stdout; remarks do not
// matter.
func (d *harness) expect(line, stdout string) {
	d.t.Helper()
	if code, out, errs := d.run(line); code != 0 || out != stdout {
		d.t.Errorf("%s: exit %d, printed\n%s%s\nwant\n%s", line, code, out, errs, stdout)
	}
}

// aliasNewest gives the keyset that was prepared last an alias.
func (d *harness) aliasNewest(name string) {
	d.t.Helper()
	all, err := d.server.Deployment.List(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	d.alias(all[len(all)-1].ID, name)
}

// All steps of a rotation, under both paths of the commands, with their output.
func TestRunbook(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"trust-domain deployment keyset ", ""} {
		synctest.Test(t, func(t *testing.T) {
			d := newHarness(t)
			const flags = " --trust-domain example.org --deployment-name default"
			const header = "Deployment: default\nSigning Keys:\n"
			d.expect(path+"list"+flags, header+
				`Type   Keyset ID      Issued At                      Expires At                     State   Live SVIDs  Safe to remove
X.509  ks_abc1234xyz  2000-01-01 00:00:00 +0000 UTC  2000-03-31 00:00:00 +0000 UTC  Active  0           -
JWT    ks_abc1234xyz  2000-01-01 00:00:00 +0000 UTC  2000-03-31 00:00:00 +0000 UTC  Active  none        -
`)
			time.Sleep(time.Hour)
			code, out, _ := d.run(path + "prepare" + flags)
			d.aliasNewest("ks_def5678uvw")
			if out = strings.NewReplacer(d.ids...).Replace(out); code != 0 || out != "Keyset ks_def5678uvw prepared.\n" {
				t.Fatalf("prepare: exit %d, %s", code, out)
			}
			d.expect(path+"activate ks_def5678uvw"+flags, "Keyset ks_def5678uvw activated.\n")
			d.expect(path+"list"+flags, header+
				`Type   Keyset ID      Issued At                      Expires At                     State     Live SVIDs  Safe to remove
X.509  ks_abc1234xyz  2000-01-01 00:00:00 +0000 UTC  2000-03-31 00:00:00 +0000 UTC  Prepared  0           -
JWT    ks_abc1234xyz  2000-01-01 00:00:00 +0000 UTC  2000-03-31 00:00:00 +0000 UTC  Prepared  none        -
X.509  ks_def5678uvw  2000-01-01 01:00:00 +0000 UTC  2000-03-31 01:00:00 +0000 UTC  Active    0           -
JWT    ks_def5678uvw  2000-01-01 01:00:00 +0000 UTC  2000-03-31 01:00:00 +0000 UTC  Active    none        -
`)
			d.expect(path+"taint ks_abc1234xyz"+flags, "Keyset ks_abc1234xyz tainted.\n")
			d.expect(path+"wait ks_abc1234xyz"+flags, "Keyset ks_abc1234xyz is safe to remove.\n")
			d.expect(path+"remove ks_abc1234xyz"+flags, "Keyset ks_abc1234xyz removed.\n")
			d.expect(path+"list"+flags, header+
				`Type   Keyset ID      Issued At                      Expires At                     State   Live SVIDs  Safe to remove
X.509  ks_def5678uvw  2000-01-01 01:00:00 +0000 UTC  2000-03-31 01:00:00 +0000 UTC  Active  0           -
JWT    ks_def5678uvw  2000-01-01 01:00:00 +0000 UTC  2000-03-31 01:00:00 +0000 UTC  Active  none        -
`)
			if d.target.TrustDomain != "example.org" || d.target.Deployment != "default" {
				t.Errorf("the flags did not arrive: %+v", d.target)
			}
		})
	}
}

// Each error that an operator may meet has a remedy.
func TestTroubleshooting(t *testing.T) {
	t.Parallel()
	prepared := func(d *harness) {
		d.run("prepare")
		d.aliasNewest("ks_def5678uvw")
	}
	taintedOld := func(d *harness) {
		prepared(d)
		d.run("activate ks_def5678uvw")
		d.run("taint ks_abc1234xyz")
	}
	failing := func(err error) func(*harness) {
		return func(d *harness) {
			d.server.Before = func(call, _ string) error {
				if call == "status" {
					return nil
				}
				return err
			}
		}
	}
	const outcomeUnknown = "The change may have been made. Check keysetctl list before you repeat the command.\n"
	for name, tt := range map[string]struct {
		state  func(*harness)
		line   string
		code   int
		stderr string
	}{
		"another operation, or automatic rotation": {failing(refusal.ErrBusy), "prepare", 1,
			"Error: The request failed due to an internal error, please try again.\n" +
				"The deployment was being changed by another command or by automatic rotation. Your command had no effect.\n" +
				"Check keysetctl list, and repeat the command if it is still needed.\n"},
		"the same from a server that only sends its text": {failing(errors.New(refusal.ErrBusy.Error())), "taint ks_abc1234xyz", 1,
			"Error: The request failed due to an internal error, please try again.\n" +
				"The deployment was being changed by another command or by automatic rotation. Your command had no effect.\n" +
				"Check keysetctl list, and repeat the command if it is still needed.\n"},
		"tainting the active keyset": {prepared, "taint ks_abc1234xyz", 1,
			"Error: cannot taint active key set\nThe keyset is signing. Let another one sign with keysetctl activate, then repeat the command.\n"},
		"activating a tainted one": {taintedOld, "activate ks_abc1234xyz", 1,
			"Error: cannot activate tainted key set\nA taint cannot be undone. Run keysetctl prepare, and activate the ID that it prints.\n"},
		"activating the active one": {prepared, "activate ks_abc1234xyz", 1,
			"Error: cannot activate active key set\nNothing to do: the keyset is signing.\n"},
		"tainting twice": {taintedOld, "taint ks_abc1234xyz", 1,
			"Error: cannot taint tainted key set\nNothing to do: the taint is published. Go on with keysetctl wait.\n"},
		"removing the active one": {prepared, "remove ks_abc1234xyz", 1,
			"Error: cannot remove active key set\nThe keyset is signing. Let another one sign with keysetctl activate, then taint this one and wait.\n"},
		"removing a prepared one, with force too": {prepared, "remove ks_def5678uvw --force", 1,
			"Error: cannot remove prepared key set\nRun keysetctl taint and keysetctl wait with its ID before you remove it.\n"},
		"a keyset that does not exist": {nil, "remove ks_nosuch", 1,
			"Error: key set not found\nCopy the ID from keysetctl list.\n"},
		"an expired one": {func(d *harness) { prepared(d); time.Sleep(91 * 24 * time.Hour) }, "activate ks_def5678uvw", 1,
			"Error: cannot activate expired key set\nRun keysetctl prepare, and activate the ID that it prints.\n"},
		"a timeout": {failing(fmt.Errorf("the server did not answer within 2m0s: %w", runbook.ErrOutcomeUnknown)), "activate ks_abc1234xyz", 1,
			"Error: the server did not answer within 2m0s: the outcome is not known\n" + outcomeUnknown},
		"the connection is lost": {failing(context.Canceled), "prepare", 1,
			"Error: the outcome is not known: context canceled\n" + outcomeUnknown},
		"removing too soon": {func(d *harness) {
			taintedOld(d)
			d.server.HoldersAt = func(string, time.Time) []runbook.Holder {
				return []runbook.Holder{{Agent: "spiffe://example.org/agent/a", Version: "0.36.0", SVIDs: 3, Reason: "behind"}}
			}
		}, "remove ks_abc1234xyz", 3, `Error: cannot remove ks_abc1234xyz: it is not safe yet
3 X.509-SVIDs of 1 agent depend on it.
  spiffe://example.org/agent/a: 3 SVIDs, behind: it has not applied the taint yet (version 0.36.0)
It ends about 2000-01-01 00:01:00 +0000 UTC (in 1m1s).
Run keysetctl wait ks_abc1234xyz, then remove it. With --force it is removed now, and the SVIDs that depend on it are rejected.
`},
		"agents that do not renew": {func(d *harness) {
			taintedOld(d)
			d.server.HoldersAt = func(_ string, now time.Time) []runbook.Holder {
				return []runbook.Holder{{Agent: "spiffe://example.org/agent/a", SVIDs: 3, Reason: "silent", LatestExpiry: time.Date(2000, 1, 1, 12, 0, 0, 0, time.UTC)}}
			}
		}, "wait ks_abc1234xyz --timeout 5m", 3, `ks_abc1234xyz: 3 X.509-SVIDs of 1 agent left, done in 12h5m at the latest; /agent/a silent
Error: keyset ks_abc1234xyz is not safe to remove after 5m
3 X.509-SVIDs of 1 agent depend on it.
  spiffe://example.org/agent/a: 3 SVIDs, silent: no report yet, the last expires 2000-01-01 12:00:00 +0000 UTC (in 11h55m)
It ends at the latest 2000-01-01 12:05:00 +0000 UTC (in 12h), when the SVIDs of silent agents have expired by all clocks.
Check the agents that are silent or behind, and run keysetctl wait ks_abc1234xyz again.
`},
		"waiting for what was never tainted": {prepared, "wait ks_def5678uvw", 1,
			"Error: wait for keyset ks_def5678uvw: it is Prepared, and agents keep what it signed: run keysetctl taint ks_def5678uvw\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				d := newHarness(t)
				if tt.state != nil {
					tt.state(d)
				}
				code, out, errs := d.run(tt.line)
				if strings.HasPrefix(tt.line, "wait") && tt.code == 3 {
					// Keep the first progress line only.
					first, _, _ := strings.Cut(errs, "\n")
					if i := strings.Index(errs, "Error:"); i > 0 {
						errs = first + "\n" + errs[i:]
					}
				}
				if code != tt.code || errs != tt.stderr || out != "" {
					t.Errorf("exit %d, want %d; printed\n%s%s\nwant\n%s", code, tt.code, out, errs, tt.stderr)
				}
			})
		})
	}
}

// A usage error names the mistake and the remedy, and no server is called.
func TestUsageErrors(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"":                                      "no command: the commands are list, prepare, activate, taint, wait, remove, rotate, plan, version, trust-domain",
		"lst":                                   `unknown command "lst": the commands are list, prepare`,
		"trust-domain":                          "no command: the commands are deployment",
		"trust-domain deployment keyset":        "no command: the commands are list, prepare, activate, taint, wait, remove, rotate",
		"trust-domain deployment keyset plan":   `unknown command "plan"`,
		"list ks_a":                             `list: takes no argument, but got "ks_a"`,
		"activate":                              `activate: give the keyset's ID, as in "keysetctl activate ks_abc1234xyz"`,
		"taint ks_a ks_b":                       `taint: takes one keyset ID, but also got "ks_b"`,
		"list --nosuch":                         "list: there is no flag --nosuch",
		"list -x":                               "list: there is no flag -x",
		"list -server a:1":                      "list: write --server with two dashes",
		"rotate -yes":                           "rotate: write --yes with two dashes",
		"list --force":                          "list: there is no flag --force",
		"list --output":                         "list: --output needs a value",
		"list -o yaml":                          `--output takes text or json, not "yaml"`,
		"wait ks_a --timeout 5":                 `wait: --timeout does not take "5": give a duration such as 90s or 5m`,
		"wait ks_a --timeout -5s":               "--timeout must not be negative, and is -5s",
		"wait ks_a --interval 0s":               "--interval must be above 0, and is 0s",
		"wait ks_a --for x510":                  `--for takes one of x509, jwt, all, and is "x510"`,
		"wait ks_a --until 99":                  `wait: --until does not take "99": give the share of the agents, such as 99%`,
		"wait ks_a --until 0%":                  `wait: --until does not take "0%": give the share of the agents`,
		"wait ks_a --until NaN%":                `wait: --until does not take "NaN%": give the share of the agents`,
		"wait ks_a --until 99% --for all":       "--until is for X.509-SVIDs: leave out --for all",
		"rotate --yes --until 99%":              "rotate: there is no flag --until",
		"rotate --for jwt --yes":                `--for takes one of x509, all, and is "jwt"`,
		"rotate":                                "rotate: cannot ask before each step without a terminal: give --yes",
		"list --server a:1 --spire-socket /s":   "--server and --spire-socket name two servers: give one of them",
		"list --server a:1":                     "--server a:1: SPIFFE_ENDPOINT_SOCKET is not set",
		"prepare --server localhost":            "--server localhost is not host:port: give it with its port, such as server.example.org:8082",
		"list --server :8082":                   "--server :8082 has no host: give it with its port",
		"list --prometheus http://p":            "--prometheus http://p: a renewd server knows the figures itself",
		"list --agents 3":                       "--prometheus-job and --agents need Prometheus: give --prometheus URL with them",
		"list --spire-socket=":                  "--spire-socket is empty: give the server's address, or omit the flag",
		"list --svid-life 48h":                  "--svid-life is for a SPIRE server: a renewd server knows it; omit it, or give --spire-socket",
		"list --spire-socket /s --svid-life 1s": "--svid-life must be at least a minute, and is 1s",
		"list --spire-socket /s,/s":             "--spire-socket /s is given twice: give each server once",
		"list --spire-socket /s,":               "--spire-socket is empty: give the server's address, or omit the flag",
		"list --spire-server a:1":               "--spire-server a:1: SPIFFE_ENDPOINT_SOCKET is not set",
		"list --spire-server a":                 "--spire-server a is not host:port: give it with its port",
		"list --spire-server a:1 --server b:1":  "--server and --spire-server name two servers: give one of them",
		"plan --agents 3":                       `plan: give --agents N and --svids M, as in "keysetctl plan --agents 200 --svids 50"`,
		"plan --agents 0 --svids 1":             "plan: --agents must be from 1 to 100000, and is 0",
		"plan --agents 1 --svids 1 --rate 0":    "plan: --rate must be above 0",
		"plan --agents many --svids 1":          `plan: --agents does not take "many": give a number`,
		"help nosuch":                           `no help for "nosuch"`,
		"version 2":                             `version: takes no argument, but got "2"`,
	} {
		d := newHarness(t)
		d.server.Before = func(call, _ string) error {
			t.Errorf("%q called the server: %s", line, call)
			return nil
		}
		code, out, errs := d.run(line)
		if code != 2 || out != "" || !strings.HasPrefix(errs, "Error: "+want) || !strings.HasSuffix(errs, " --help\" shows the usage.\n") {
			t.Errorf("%q: exit %d, printed %s%s\nwant %s", line, code, out, errs, want)
		}
	}
}

// Flags override the environment, and may stand anywhere.
func TestTarget(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]target{
		"list": {TrustDomain: "env.org", Deployment: "env", AdminSocket: "/env.sock"},
		"list --trust-domain a.org --deployment-name b --admin-socket /c": {TrustDomain: "a.org", Deployment: "b", AdminSocket: "/c"},
		"--deployment-name b list":                                        {TrustDomain: "env.org", Deployment: "b", AdminSocket: "/env.sock"},
		"prepare --server h:1":                                            {TrustDomain: "env.org", Deployment: "env", AdminSocket: "/env.sock", Server: "h:1"},
		"list --spire-socket /s --prometheus http://p --prometheus-job j --agents 4 --svid-life 48h": {TrustDomain: "env.org", Deployment: "env", AdminSocket: "/env.sock",
			SpireSockets: []string{"/s"}, Prometheus: "http://p", Job: "j", Agents: 4, SVIDLife: 48 * time.Hour},
		"list --spire-socket /s,/t --spire-server h:1 --spire-socket /u": {TrustDomain: "env.org", Deployment: "env", AdminSocket: "/env.sock",
			SpireSockets: []string{"/s", "/t", "/u"}, SpireServers: []string{"h:1"}},
	} {
		d := newHarness(t)
		d.env = map[string]string{"TRUST_DOMAIN": "env.org", "DEPLOYMENT_NAME": "env", "RENEWD_ADMIN_SOCKET": "/env.sock", "SPIFFE_ENDPOINT_SOCKET": "unix:///w"}
		want.WorkloadAPI = "unix:///w"
		if want.Job == "" {
			want.Job, want.SVIDLife = "renewd-agent", 24*time.Hour
		}
		code, _, errs := d.run(line)
		d.target.Notice = nil
		if code != 0 || !reflect.DeepEqual(d.target, want) {
			t.Errorf("%s: exit %d %s\ngot  %+v\nwant %+v", line, code, errs, d.target, want)
		}
	}
	d := newHarness(t)
	d.run("list")
	if d.target.AdminSocket != "/run/renewd-server/admin.sock" {
		t.Errorf("the default is %+v", d.target)
	}
}

// The servers of a SPIRE cluster may be in the environment. A flag for any server replaces
// them.
func TestClusterOfEnvironment(t *testing.T) {
	t.Parallel()
	for line, want := range map[string][2]string{
		"list":                      {"[/a /b]", "[h:1 i:1]"},
		"list --spire-socket /c":    {"[/c]", "[]"},
		"list --spire-server j:1":   {"[]", "[j:1]"},
		"list --admin-socket /sock": {"[]", "[]"},
	} {
		d := newHarness(t)
		d.env = map[string]string{"RENEWD_SPIRE_SOCKET": "/a,/b", "RENEWD_SPIRE_SERVER": "h:1,i:1", "SPIFFE_ENDPOINT_SOCKET": "unix:///w"}
		code, _, errs := d.run(line)
		if got := [2]string{fmt.Sprint(d.target.SpireSockets), fmt.Sprint(d.target.SpireServers)}; code != 0 || got != want {
			t.Errorf("%s: exit %d %s\ngot  %v\nwant %v", line, code, errs, got, want)
		}
	}
}

// JSON output has the keys that scripts rely on.
func TestJSON(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newHarness(t)
		keys := func(line string, want ...string) map[string]any {
			t.Helper()
			code, out, errs := d.run(line + " -o json")
			var got map[string]any
			if err := json.Unmarshal([]byte(out), &got); err != nil || (code != 0 && code != 3) {
				t.Fatalf("%s: exit %d, %v\n%s%s", line, code, err, out, errs)
			}
			for _, k := range want {
				if _, ok := got[k]; !ok {
					t.Errorf("%s: no %q in %s", line, k, out)
				}
			}
			return got
		}
		if got := keys("prepare", "keyset", "done"); got["done"] != "prepared" {
			t.Errorf("prepare: %v", got)
		}
		d.aliasNewest("ks_def5678uvw")
		keys("activate ks_def5678uvw", "keyset", "done")
		keys("taint ks_abc1234xyz", "keyset", "done")
		s := keys("list", "trust_domain", "deployment", "keysets", "sequence", "agents", "agents_behind")
		k, _ := s["keysets"].([]any)[0].(map[string]any)
		for _, key := range []string{"id", "state", "issued_at", "expires_at", "x509_authority_id", "jwt_key_id", "x509_svids", "x509_safe", "jwt_safe", "tainted_at"} {
			if _, ok := k[key]; !ok {
				t.Errorf("list: no %q in %v", key, k)
			}
		}
		held := []runbook.Holder{{Agent: "spiffe://example.org/agent/a", SVIDs: 3, Reason: "renewing"}}
		d.server.HoldersAt = func(string, time.Time) []runbook.Holder { return held }
		if got := keys("wait ks_abc1234xyz --timeout 10s", "keyset", "for", "safe", "holders", "x509_svids", "waited_seconds"); got["safe"] != false || got["waited_seconds"] != 10.0 {
			t.Errorf("wait: %v", got)
		}
		held = nil
		if got := keys("wait ks_abc1234xyz"); got["safe"] != true {
			t.Errorf("wait: %v", got)
		}
		if got := keys("rotate --yes", "steps", "complete", "active"); got["complete"] != true || len(got["steps"].([]any)) != 1 {
			t.Errorf("rotate: %v", got)
		}
		keys("plan --agents 2 --svids 3", "agents", "svids_per_agent", "peak_mints_a_second", "half_done_seconds", "mints_in_each_second", "seed")
	})
}

// A whole rotation in one command. Remarks of remove and list go to stderr.
func TestRotate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newHarness(t)
		old := d.server.Deployment.Active().ID
		d.server.JWTExpiry[old] = time.Now().Add(24 * time.Hour)
		code, out, errs := d.run("rotate --yes")
		d.aliasNewest("ks_def5678uvw")
		out = strings.NewReplacer(d.ids...).Replace(out)
		want := `Keyset ks_def5678uvw prepared.
Keyset ks_def5678uvw activated.
Keyset ks_abc1234xyz tainted.
Keyset ks_abc1234xyz removed.
The rotation is complete: ks_def5678uvw is active.
`
		wantErr := `Waiting until ks_abc1234xyz is safe to remove.
The last JWT-SVID that ks_abc1234xyz signed expires 2000-01-02 00:00:00 +0000 UTC (in 1d). Removal ends it earlier, at each relying party's next bundle refresh.
Nodes made with a trust bundle of before the rotation cannot verify the server: refresh it wherever nodes are made, with "server bundle" or "spire-server bundle show".
`
		if code != 0 || out != want || errs != wantErr {
			t.Errorf("exit %d\n%s%s\nwant\n%s%s", code, out, errs, want, wantErr)
		}
		d.server.Unknown = "Prometheus is down"
		if code, out, errs := d.run("list"); code != 0 || strings.Contains(out, "Prometheus") ||
			errs != "The figures of ks_def5678uvw are not known: Prometheus is down.\n" {
			t.Errorf("list: exit %d\n%s%s", code, out, errs)
		}
	})
}

// After an interrupted wait the error says how to continue.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	for line, waits := range map[string]string{
		"wait ks_abc1234xyz": "wait for keyset ks_abc1234xyz: interrupt signal received\nRun keysetctl wait again to continue.\n",
		"rotate --yes":       "wait for keyset ks_abc1234xyz: interrupt signal received\nRun keysetctl rotate again to continue.\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			d := newHarness(t)
			d.run("prepare")
			d.aliasNewest("ks_def5678uvw")
			d.run("activate ks_def5678uvw")
			d.run("taint ks_abc1234xyz")
			d.server.HoldersAt = func(string, time.Time) []runbook.Holder {
				return []runbook.Holder{{Agent: "spiffe://example.org/agent/a", SVIDs: 3, Reason: "behind"}}
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			d.ctx = ctx
			time.AfterFunc(5*time.Second, func() { cancel(errors.New("interrupt signal received")) })
			if code, out, errs := d.run(line); code != 1 || out != "" || !strings.HasSuffix(errs, "\nError: "+waits) {
				t.Errorf("%s: exit %d\n%s%s", line, code, out, errs)
			}
		})
	}
}

// Only y and yes mean yes. The end of the input means no.
func TestAsk(t *testing.T) {
	t.Parallel()
	var errs bytes.Buffer
	p := &program{stdin: strings.NewReader("y\nYES \nn\n\nsure\n"), stderr: &errs}
	ask := p.asker(t.Context(), nil)
	for i, want := range []bool{true, true, false, false, false} {
		if got, err := ask("Go on?"); err != nil || got != want {
			t.Errorf("answer %d: %v, %v", i, got, err)
		}
	}
	if got, err := ask("Go on?"); err != nil || got {
		t.Errorf("at the end: %v, %v", got, err)
	}
	if !strings.HasPrefix(errs.String(), "Go on? [y/N] Go on? [y/N] ") {
		t.Errorf("%q", errs.String())
	}
}

// Every command has its own help with an example. The help of the program names the
// five steps in order.
func TestHelp(t *testing.T) {
	t.Parallel()
	d := newHarness(t)
	var visit func(c *cobra.Command, path string)
	visit = func(c *cobra.Command, path string) {
		code, out, errs := d.run(path + " --help")
		if code != 0 || errs != "" || !strings.Contains(out, "Usage:\n  keysetctl") {
			t.Errorf("%s: exit %d\n%s%s", path, code, out, errs)
		}
		if c.Name() != "version" && !c.HasSubCommands() && !strings.Contains(out, "\nExample:\n  keysetctl") {
			t.Errorf("%s: no example", path)
		}
		for line := range strings.Lines(out) {
			if len(line) > 121 {
				t.Errorf("%s: wider than 120 columns: %q", path, line)
			}
		}
		if path != "" {
			if code, again, _ := d.run("help " + path); code != 0 || again != out {
				t.Errorf("help %s: exit %d, another text than --help:\n%s", path, code, again)
			}
		}
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() && sub.Name() != "help" {
				visit(sub, strings.TrimSpace(path+" "+sub.Name()))
			}
		}
	}
	p := &program{getenv: func(string) string { return "" }}
	visit(p.root(), "")
	_, out, _ := d.run("--help")
	at := 0
	for i, step := range []string{"prepare", "activate NEW", "taint OLD", "wait OLD", "remove OLD"} {
		next := strings.Index(out, fmt.Sprintf("  %d. keysetctl %s", i+1, step))
		if next < at {
			t.Errorf("step %d is missing or not in order", i+1)
		}
		at = max(next, at)
	}
	if _, out, _ := d.run("plan --help"); strings.Contains(out, "--admin-socket") {
		t.Errorf("plan needs no server:\n%s", out)
	}
}

// If the server's socket does not exist, the error names it.
func TestNoServer(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	none := func(string) string { return "" }
	code := run(t.Context(), []string{"list", "--spire-socket", "/nonexistent/api.sock"}, none, strings.NewReader(""), &out, &errs, dial)
	if code != 1 || !strings.Contains(errs.String(), "/nonexistent/api.sock") || out.String() != "" {
		t.Errorf("exit %d\n%s%s", code, out.String(), errs.String())
	}
}

// A malformed URL of Prometheus is a usage error. Its password is not printed.
func TestWrongPrometheus(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	none := func(string) string { return "" }
	code := run(t.Context(), []string{"prepare", "--spire-socket", "/nonexistent/api.sock", "--prometheus", "me:secret@host:9090"}, none, strings.NewReader(""), &out, &errs, dial)
	if want := "Error: --prometheus: prometheus: the URL must be like https://prometheus.example.org:9090\n"; code != 2 || !strings.HasPrefix(errs.String(), want) || strings.Contains(errs.String(), "secret") {
		t.Errorf("exit %d\n%swant\n%s", code, errs.String(), want)
	}
}

// If the step succeeds and its output fails, the error says so: the operator must not
// repeat the step.
func TestOutputFails(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		d := newHarness(t)
		var errs bytes.Buffer
		code := run(t.Context(), []string{"prepare", "-o", format}, func(string) string { return "" }, strings.NewReader(""), full{}, &errs,
			func(context.Context, target) (runbook.Backend, io.Closer, error) {
				return d.server, io.NopCloser(nil), nil
			})
		all, err := d.server.Deployment.List(t.Context())
		if err != nil || len(all) != 2 {
			t.Fatalf("%v, %v", all, err)
		}
		if want := "Error: keyset " + all[1].ID + " is prepared, but printing the result failed: write output: no space left on device\n"; code != 1 || errs.String() != want {
			t.Errorf("%s: exit %d\n%swant\n%s", format, code, errs.String(), want)
		}
	}
}

// full is an output on a full disk.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

func TestVersion(t *testing.T) {
	t.Parallel()
	if code, out, _ := newHarness(t).run("version"); code != 0 || !strings.HasPrefix(out, "renewd keysetctl ") {
		t.Errorf("exit %d, %s", code, out)
	}
	if code, out, _ := newHarness(t).run("--version"); code != 0 || !strings.HasPrefix(out, "renewd keysetctl ") {
		t.Errorf("--version: exit %d, %s", code, out)
	}
	var as struct{ Program, Version, Go string }
	if code, out, _ := newHarness(t).run("version -o json"); code != 0 || json.Unmarshal([]byte(out), &as) != nil ||
		as.Program != "keysetctl" || as.Version == "" || as.Go != runtime.Version() {
		t.Errorf("-o json: exit %d, %s", code, out)
	}
}

// Text of a server, an agent or Prometheus is printed without control characters, and
// cannot start another line in the remarks.
func TestTextFromElsewhere(t *testing.T) {
	t.Parallel()
	const text = "\x1b[2J\x1b]0;x\a\u009b1A\rall is safe"
	for name, tt := range map[string]struct {
		unknown string
		err     error
		lines   []string
	}{
		"reason of unknown figures": {unknown: text, lines: []string{"list", "list -o json", "wait OLD --timeout 1s", "remove OLD", "rotate --yes --timeout 1s"}},
		"error":                     {err: errors.New(text), lines: []string{"list", "prepare", "wait OLD --timeout 1s", "wait OLD -o json --timeout 1s", "rotate --yes"}},
	} {
		for _, line := range tt.lines {
			synctest.Test(t, func(t *testing.T) {
				d := newHarness(t)
				d.run("prepare")
				d.aliasNewest("NEW")
				d.run("activate NEW")
				d.run("taint ks_abc1234xyz")
				d.server.Unknown, d.server.Agents = tt.unknown, -1
				if tt.err != nil {
					d.server.Before = func(string, string) error { return tt.err }
				}
				_, out, errs := d.run(strings.ReplaceAll(line, "OLD", "ks_abc1234xyz"))
				if !strings.Contains(out+errs, "all is safe") {
					t.Errorf("%s, %s: text missing:\n%s%s", name, line, out, errs)
				}
				if i := strings.IndexFunc(out+errs, func(r rune) bool { return !unicode.IsPrint(r) && r != '\n' }); i >= 0 {
					t.Errorf("%s, %s: control character at %d of %q", name, line, i, out+errs)
				}
			})
		}
	}
	k := runbook.Keyset{ID: "ks_a", Unknown: "no answer.\nks_b is safe"}
	if lines := strings.Join(runbook.Remarks(runbook.Status{Agents: 1, Keysets: []runbook.Keyset{k}}, time.Now()), ""); strings.Contains(lines, "\n") {
		t.Errorf("a reason starts another line: %q", lines)
	}
}

// The shell completes the IDs of keysets that fit the verb. Without a server it completes
// nothing, and no file names.
func TestCompletion(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newHarness(t)
		d.run("prepare")
		d.aliasNewest("ks_def5678uvw")
		for line, want := range map[string]string{
			"__complete activate ":                                   "ks_def5678uvw\tPrepared\n:4\n",
			"__complete taint ks":                                    "ks_def5678uvw\tPrepared\n:4\n",
			"__complete wait ":                                       ":4\n",
			"__complete rotate --keyset ":                            "ks_def5678uvw\tPrepared\n:4\n",
			"__complete activate ks_def5678uvw ":                     ":4\n",
			"__complete list ":                                       ":4\n",
			"__completeNoDesc trust-domain deployment keyset taint ": "ks_def5678uvw\n:4\n",
		} {
			if code, out, errs := d.runArgs(strings.Split(line, " ")); code != 0 || out != want {
				t.Errorf("%q: exit %d, %q, want %q\n%s", line, code, out, want, errs)
			}
		}
		d.server.Before = func(string, string) error { return errors.New("no such socket") }
		if code, out, _ := d.runArgs([]string{"__complete", "wait", ""}); code != 0 || out != ":4\n" {
			t.Errorf("without a server: exit %d, %q", code, out)
		}
		for _, shell := range []string{"bash", "zsh", "fish"} {
			if code, out, errs := d.run("completion " + shell); code != 0 || !strings.Contains(out, "__complete") {
				t.Errorf("completion %s: exit %d, %s", shell, code, errs)
			}
		}
	})
}

// The manual page has the sections that readers look for, and every command.
func TestManualPage(t *testing.T) {
	t.Parallel()
	d := newHarness(t)
	code, out, errs := d.run("man")
	for _, want := range []string{
		".TH KEYSETCTL 1\n", ".SH NAME\nkeysetctl \\- replaces the signing keys of a deployment", ".SH SYNOPSIS\n.B keysetctl\n", ".SH EXIT STATUS\n.nf\n0 success;",
		".SS rotate\n", ".SS wait\n", "\\-\\-until SHARE",
	} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("exit %d, no %q in\n%s%s", code, want, out, errs)
		}
	}
}
