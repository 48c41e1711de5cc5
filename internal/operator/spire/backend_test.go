package spire_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/operator/spire"
	"github.com/renewd/renewd/internal/refusal"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRotation(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{TrustDomain: "example.org"})
	s := wantRows(t, b, "Active/Active")
	a := s.Keysets[0]
	if s.TrustDomain != "example.org" || s.Deployment != "default" || s.Sequence != f.sequence || s.Automatic == "" {
		t.Errorf("status %+v", s)
	}
	if a.ID != "ks_"+a.X509AuthorityID[:10] || a.X509AuthorityID != f.x.active || a.JWTKeyID != f.j.active {
		t.Errorf("keyset %+v", a)
	}
	if !a.IssuedAt.Equal(f.now) || !a.ExpiresAt.Equal(f.now.Add(caTTL)) || a.SteppedDown {
		t.Errorf("issued %v, expires %v, want %v", a.IssuedAt, a.ExpiresAt, f.now)
	}
	n, err := b.Prepare(t.Context())
	must(t, err)
	s = wantRows(t, b, "Active/Active Prepared/Prepared")
	if s.Keysets[1] != withoutFigures(n, s.Keysets[1]) || n.ID == a.ID || n.State != runbook.Prepared {
		t.Errorf("prepared %+v, listed %+v", n, s.Keysets[1])
	}
	must(t, b.Activate(t.Context(), n.ID))
	s = wantRows(t, b, "Prepared/Prepared Active/Active")
	if !s.Keysets[0].SteppedDown || s.Keysets[0].ID != a.ID || s.Keysets[1].SteppedDown {
		t.Errorf("activated: %+v", s.Keysets)
	}
	must(t, b.Taint(t.Context(), a.X509AuthorityID))
	wantRows(t, b, "Tainted/Tainted Active/Active")
	must(t, b.Remove(t.Context(), a.JWTKeyID, true))
	s = wantRows(t, b, "Active/Active")
	if s.Keysets[0].ID != n.ID {
		t.Errorf("left is %+v", s.Keysets[0])
	}
	if got := f.takeCalls(); got != "PrepareX509 PrepareJWT ActivateX509 ActivateJWT TaintX509 TaintJWT RevokeJWT RevokeX509" {
		t.Error("calls:", got)
	}
	// The revoked authorities stay in their slots, and another rotation can begin.
	_, err = b.Prepare(t.Context())
	must(t, err)
	wantRows(t, b, "Active/Active Prepared/Prepared")
}

func withoutFigures(k, like runbook.Keyset) runbook.Keyset {
	k.Unknown, k.Unknowable = like.Unknown, like.Unknowable
	return k
}

// startAt brings the server to a stage of a rotation. It returns the IDs of the active
// keyset and of the next one, which is prepared, old, tainted or gone.
func startAt(t *testing.T, f *fakeSPIRE, b *spire.Backend, stage string) (active, next string) {
	t.Helper()
	first := wantRows(t, b, "Active/Active").Keysets[0].ID
	if stage == "gone" {
		return first, "ks_unknown000"
	}
	n, err := b.Prepare(t.Context())
	must(t, err)
	if stage == "prepared" {
		return first, n.ID
	}
	must(t, b.Activate(t.Context(), n.ID))
	if stage == "tainted" {
		must(t, b.Taint(t.Context(), first))
	}
	f.takeCalls()
	return n.ID, first
}

// TestEveryStepFromEveryState tries each step on a keyset in each state.
func TestEveryStepFromEveryState(t *testing.T) {
	t.Parallel()
	steps := map[string]func(*spire.Backend, context.Context, string) error{
		"activate": (*spire.Backend).Activate,
		"taint":    (*spire.Backend).Taint,
		"remove": func(b *spire.Backend, ctx context.Context, id string) error {
			return b.Remove(ctx, id, true)
		},
		"prepare": func(b *spire.Backend, ctx context.Context, _ string) error {
			_, err := b.Prepare(ctx)
			return err
		},
	}
	for _, tt := range []struct{ step, stage, err string }{
		{"activate", "prepared", ""},
		{"activate", "active", "cannot activate active key set"},
		{"activate", "old", "cannot activate key set ID: a SPIRE server activates no old one; prepare a new one"},
		{"activate", "tainted", "cannot activate tainted key set"},
		{"activate", "gone", "key set not found"},
		{"taint", "prepared", "cannot taint key set ID: a SPIRE server taints only one that was active before; activate it, then another one"},
		{"taint", "active", "cannot taint active key set"},
		{"taint", "old", ""},
		{"taint", "tainted", "cannot taint tainted key set"},
		{"taint", "gone", "key set not found"},
		{"remove", "prepared", "cannot remove prepared key set"},
		{"remove", "active", "cannot remove active key set"},
		{"remove", "old", "cannot remove prepared key set"},
		{"remove", "tainted", ""},
		{"remove", "gone", "key set not found"},
		{"prepare", "gone", ""},
		{"prepare", "prepared", "cannot prepare: a SPIRE server has room for one prepared key set, which is ID; activate it, then taint and remove the old one"},
		{"prepare", "old", "cannot prepare: a SPIRE server has room for one key set beside the active one, and would forget ID; taint and remove it first"},
		{"prepare", "tainted", "cannot prepare: a SPIRE server has room for one key set beside the active one, and would forget ID; taint and remove it first"},
	} {
		t.Run(tt.step+" "+tt.stage, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			b := f.serve(spire.Config{})
			active, id := startAt(t, f, b, strings.Replace(tt.stage, "active", "old", 1))
			if tt.stage == "active" {
				id = active
			}
			before, _ := rows(t, b)
			f.takeCalls()
			err := steps[tt.step](b, t.Context(), id)
			if tt.err == "" {
				must(t, err)
				return
			}
			want := strings.ReplaceAll(tt.err, "ID", id)
			if _, ok := err.(refusal.Error); !ok || err.Error() != want { //nolint:errorlint // a refusal is returned as it is
				t.Errorf("error %v, want %q", err, want)
			}
			if calls := f.takeCalls(); calls != "" {
				t.Errorf("refused, but called %s", calls)
			}
			wantRows(t, b, before)
		})
	}
}

// TestInterruptedSteps lets each step fail at its first or second call, before or after
// the server has executed it. The same step again must make only the missing calls.
func TestInterruptedSteps(t *testing.T) {
	t.Parallel()
	type step struct {
		name, stage   string
		first, second string
		run           func(b *spire.Backend, ctx context.Context, active, next string) error
		// The keysets before, between the calls, and after.
		before, between, after string
	}
	for _, st := range []step{
		{
			"prepare", "gone", "PrepareX509", "PrepareJWT",
			func(b *spire.Backend, ctx context.Context, _, _ string) error { _, err := b.Prepare(ctx); return err },
			"Active/Active", "Active/Active Prepared/-", "Active/Active Prepared/Prepared",
		}, {
			"activate", "prepared", "ActivateX509", "ActivateJWT",
			func(b *spire.Backend, ctx context.Context, _, next string) error { return b.Activate(ctx, next) },
			"Active/Active Prepared/Prepared", "Prepared/Active Active/Prepared", "Prepared/Prepared Active/Active",
		}, {
			"taint", "old", "TaintX509", "TaintJWT",
			func(b *spire.Backend, ctx context.Context, _, next string) error { return b.Taint(ctx, next) },
			"Prepared/Prepared Active/Active", "Tainted/Prepared Active/Active", "Tainted/Tainted Active/Active",
		}, {
			"remove", "tainted", "RevokeJWT", "RevokeX509",
			func(b *spire.Backend, ctx context.Context, _, next string) error { return b.Remove(ctx, next, true) },
			"Tainted/Tainted Active/Active", "Tainted/- Active/Active", "Active/Active",
		},
	} {
		for _, tt := range []struct {
			name    string
			at      string
			lost    bool // the answer is lost after the mutation
			code    codes.Code
			left    string // the calls that the second attempt must make
			then    string // the keysets after the failure
			unknown bool
			busy    bool
		}{
			{"first refused", st.first, false, codes.PermissionDenied, st.first + " " + st.second, st.before, false, false},
			{"first too late", st.first, false, codes.InvalidArgument, st.first + " " + st.second, st.before, false, true},
			{"first fails", st.first, false, codes.Internal, st.first + " " + st.second, st.before, true, false},
			{"first lost", st.first, true, codes.Unavailable, st.second, st.between, true, false},
			{"second refused", st.second, false, codes.FailedPrecondition, st.second, st.between, false, false},
			{"second too late", st.second, false, codes.InvalidArgument, st.second, st.between, false, false},
			{"second fails", st.second, false, codes.Unknown, st.second, st.between, true, false},
			{"second lost", st.second, true, codes.Unavailable, "", st.after, true, false},
		} {
			t.Run(st.name+" "+tt.name, func(t *testing.T) {
				t.Parallel()
				f := newFake(t)
				b := f.serve(spire.Config{})
				active, next := startAt(t, f, b, st.stage)
				ids := func() (all []string) {
					_, s := rows(t, b)
					for _, k := range s.Keysets {
						all = append(all, k.ID)
					}
					return all
				}
				f.takeCalls()
				fail := func(call string) error {
					if call == tt.at {
						return status.Error(tt.code, "the reason")
					}
					return nil
				}
				if tt.lost {
					f.hook(nil, fail)
				} else {
					f.hook(fail, nil)
				}
				err := st.run(b, t.Context(), active, next)
				if err == nil || errors.Is(err, runbook.ErrOutcomeUnknown) != tt.unknown || (err == refusal.ErrBusy) != tt.busy { //nolint:errorlint // a refusal is returned as it is
					t.Fatalf("error %v", err)
				}
				if !tt.busy && !strings.Contains(err.Error(), "the reason") {
					t.Errorf("error %v without the reason", err)
				}
				second := tt.at == st.second
				if says := strings.Contains(err.Error(), "run keysetctl "+st.name+" "); second != (says || strings.Contains(err.Error(), "run keysetctl prepare again")) {
					t.Errorf("error %v", err)
				}
				calls := st.first
				if second {
					calls += " " + st.second
				}
				if got := f.takeCalls(); got != calls {
					t.Errorf("calls %q, want %q without retries", got, calls)
				}
				f.hook(nil, nil)
				wantRows(t, b, tt.then)
				before := ids()

				err = st.run(b, t.Context(), active, next)
				if got := f.takeCalls(); got != tt.left {
					t.Errorf("the step again called %q, want %q", got, tt.left)
				}
				if (err == nil) != (tt.left != "") {
					t.Errorf("the step again: %v", err)
				}
				wantRows(t, b, st.after)
				if after := ids(); tt.then == st.between && st.name != "remove" && fmt.Sprint(before) != fmt.Sprint(after) {
					t.Errorf("IDs changed from %v to %v", before, after)
				}
			})
		}
	}
}

func TestOnlyOneKeyPrepared(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{})
	second := func(call string) error {
		if strings.HasSuffix(call, "JWT") {
			return internal("database is gone")
		}
		return nil
	}
	f.hook(second, nil)
	if _, err := b.Prepare(t.Context()); err == nil {
		t.Fatal("prepared")
	}
	halfPrepared := wantRows(t, b, "Active/Active Prepared/-").Keysets[1].ID
	if err := b.Activate(t.Context(), halfPrepared); err == nil || !strings.Contains(err.Error(), "prepare again first") {
		t.Errorf("activate with one key prepared: %v", err)
	}
	f.hook(nil, nil)
	k, err := b.Prepare(t.Context())
	must(t, err)
	if k.ID != halfPrepared {
		t.Errorf("prepared %s, want %s", k.ID, halfPrepared)
	}
	f.hook(second, nil)
	if err := b.Activate(t.Context(), halfPrepared); err == nil {
		t.Fatal("activated")
	}
	f.hook(nil, nil)
	f.takeCalls()
	s := wantRows(t, b, "Prepared/Active Active/Prepared")
	if _, err := b.Prepare(t.Context()); err == nil || !strings.Contains(err.Error(), "only one key of key set "+halfPrepared+" is activated") {
		t.Errorf("prepare with one key activated: %v", err)
	}
	for _, k := range s.Keysets {
		if err := b.Taint(t.Context(), k.ID); err != refusal.ErrTaintActive { //nolint:errorlint // a refusal is returned as it is
			t.Errorf("taint %s: %v", k.ID, err)
		}
		if err := b.Remove(t.Context(), k.ID, true); err != refusal.ErrRemoveActive { //nolint:errorlint // a refusal is returned as it is
			t.Errorf("remove %s: %v", k.ID, err)
		}
	}
	if calls := f.takeCalls(); calls != "" {
		t.Error("calls:", calls)
	}
}

// TestOnlyOneKeyActivated has two keysets that were prepared within a second, so that
// their expiry times hardly differ.
func TestOnlyOneKeyActivated(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.tick = func(call string) time.Duration {
		if call == "PrepareJWT" {
			return time.Second
		}
		return 0
	}
	b := f.serve(spire.Config{})
	_, n := startAt(t, f, b, "prepared")
	must(t, f.activate("ActivateX509", f.x.next))
	wantRows(t, b, "Prepared/Active Active/Prepared")
	must(t, b.Activate(t.Context(), n))
	wantRows(t, b, "Prepared/Prepared Active/Active")
}

// TestPreparedByJWTOnly has a state that another tool can leave. It must not look like a
// keyset with one key activated.
func TestPreparedByJWTOnly(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{})
	startAt(t, f, b, "old")
	if _, err := f.prepare("PrepareJWT"); err != nil {
		t.Fatal(err)
	}
	wantRows(t, b, "Prepared/- Active/Active -/Prepared")
}

func TestSPIRERotatesItself(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{})
	_, old := startAt(t, f, b, "tainted")
	for _, call := range []string{"PrepareX509", "PrepareJWT"} {
		if _, err := f.prepare(call); err != nil {
			t.Fatal(err)
		}
	}
	f.takeCalls()
	// SPIRE has forgotten it, but it is in the bundle and must be shown.
	s := wantRows(t, b, "Tainted/Tainted Active/Active Prepared/Prepared")
	if s.Keysets[0].ID != old {
		t.Errorf("%s is now %s", old, s.Keysets[0].ID)
	}
	if err := b.Remove(t.Context(), old, true); err == nil || !strings.Contains(err.Error(), "until it expires") || f.takeCalls() != "" {
		t.Errorf("remove a forgotten authority: %v", err)
	}
	if err := b.Taint(t.Context(), old); err != refusal.ErrTaintTainted { //nolint:errorlint // a refusal is returned as it is
		t.Errorf("taint: %v", err)
	}
}

func TestOtherServersAuthorities(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{})
	x, j := f.create("X509"), f.create("JWT")
	wantRows(t, b, "Active/Active")
	for _, id := range []string{x, j, "ks_" + x[:10]} {
		if err := b.Taint(t.Context(), id); err == nil || !strings.Contains(err.Error(), "not an authority of this SPIRE server") {
			t.Errorf("taint %s: %v", id, err)
		}
	}
	// A tainted JWT authority can be revoked by any server.
	f.j.bundle[j].tainted = true
	s := wantRows(t, b, "-/Tainted Active/Active")
	must(t, b.Remove(t.Context(), s.Keysets[0].ID, false))
	wantRows(t, b, "Active/Active")
}

func TestConcurrentMutation(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{})
	// Another client prepares later and replaces our authority.
	f.hook(nil, func(call string) error {
		if call == "PrepareJWT" {
			f.x.next = f.create("X509")
		}
		return nil
	})
	if _, err := b.Prepare(t.Context()); err != refusal.ErrBusy { //nolint:errorlint // a refusal is returned as it is
		t.Errorf("prepare: %v", err)
	}
	f.hook(func(call string) error {
		if call == "ActivateX509" { // between our read and our call
			f.x.active, f.x.next, f.x.nextOld = f.x.next, f.x.active, true
		}
		return nil
	}, nil)
	_, s := rows(t, b)
	if err := b.Activate(t.Context(), s.Keysets[1].ID); err == nil {
		t.Error("activated what was active")
	}
}

func TestOutcomeUnknown(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	hang := make(chan struct{})
	f.hook(nil, func(string) error { cancel(); <-hang; return nil })
	_, err := b.Prepare(ctx)
	close(hang)
	if !errors.Is(err, runbook.ErrOutcomeUnknown) {
		t.Errorf("canceled during a mutation: %v", err)
	}
	f.hook(nil, nil)
	wantRows(t, b, "Active/Active Prepared/-")
	if got := f.takeCalls(); got != "PrepareX509" {
		t.Error("calls:", got)
	}

	gone := open(t, spire.Config{Socket: "/nonexistent/api.sock"})
	if _, err := gone.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "/nonexistent/api.sock") {
		t.Errorf("no server: %v", err)
	}
	if err := gone.Taint(t.Context(), "ks_x"); err == nil || errors.Is(err, runbook.ErrOutcomeUnknown) {
		t.Errorf("no server, and the outcome is reported as unknown: %v", err)
	}
}

func TestTrustDomainAndDeployment(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := f.serve(spire.Config{TrustDomain: "other.org", Deployment: "east"})
	if _, err := b.Status(t.Context()); err == nil || !strings.Contains(err.Error(), `"example.org", not "other.org"`) {
		t.Errorf("another trust domain: %v", err)
	}
	if err := b.Taint(t.Context(), f.x.active); err == nil || errors.Is(err, refusal.ErrTaintActive) {
		t.Errorf("taint in another trust domain: %v", err)
	}
	b = f.serve(spire.Config{TrustDomain: "spiffe://example.org", Deployment: "east"})
	if s := wantRows(t, b, "Active/Active"); s.Deployment != "east" {
		t.Errorf("deployment %q", s.Deployment)
	}
	for _, c := range []spire.Config{{}, {Socket: "x", TrustDomain: "Not A Domain"}, {Socket: "x", X509Life: -1}} {
		if _, err := spire.New(c); err == nil {
			t.Errorf("%+v: no error", c)
		}
	}
}

func TestUpstreamAuthority(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.x.bundle, f.upstream = map[string]*authority{}, "abcdef"
	f.x.active = f.create("X509")
	b := f.serve(spire.Config{Figures: figuresFunc(func(x509ID, _ string, _ []string) (prom.Figures, error) {
		if x509ID != "" {
			t.Errorf("asked for the figures of %s", x509ID)
		}
		return prom.Figures{X509Safe: true, JWTSafe: true}, nil
	})})
	active, old := startAt(t, f, b, "old")
	s := wantRows(t, b, "Prepared/Prepared Active/Active")
	for _, k := range s.Keysets {
		if k.X509Safe || k.X509SVIDs >= 0 || !strings.Contains(k.Unknown, "upstream") || !k.IssuedAt.IsZero() || k.ExpiresAt.IsZero() {
			t.Errorf("keyset %+v", k)
		}
	}
	if err := b.Taint(t.Context(), old); err == nil || !strings.Contains(err.Error(), "upstream authority abcdef signs the X.509 authorities of this SPIRE server, so they cannot be tainted") {
		t.Errorf("taint: %v", err)
	}
	if err := b.Remove(t.Context(), old, true); err == nil || !strings.Contains(err.Error(), "upstream authority abcdef signs the X.509 authorities of this SPIRE server, so they cannot be revoked") {
		t.Errorf("remove: %v", err)
	}
	if _, err := b.Holders(t.Context(), active); err == nil {
		t.Error("holders under an upstream authority")
	}
	if calls := f.takeCalls(); calls != "" {
		t.Error("calls:", calls)
	}
	_, err := b.Prepare(t.Context())
	must(t, err)
	wantRows(t, b, "Active/Active Prepared/Prepared")
}

func TestJWTDisabled(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.noJWT, f.j.bundle = true, nil
	b := f.serve(spire.Config{Figures: safeFigures})
	a := wantRows(t, b, "Active/-").Keysets[0]
	n, err := b.Prepare(t.Context())
	must(t, err)
	must(t, b.Activate(t.Context(), n.ID))
	must(t, b.Taint(t.Context(), a.ID))
	if k := wantRows(t, b, "Tainted/- Active/-").Keysets[0]; !k.X509Safe || !k.JWTSafe {
		t.Errorf("keyset %+v", k)
	}
	must(t, b.Remove(t.Context(), a.ID, false))
	if got := f.takeCalls(); got != "PrepareX509 ActivateX509 TaintX509 RevokeX509" {
		t.Error("calls:", got)
	}
}

var safeFigures = figuresFunc(func(_, _ string, expected []string) (prom.Figures, error) {
	return prom.Figures{X509Safe: true, JWTSafe: true, Expected: len(expected)}, nil
})

func TestFigures(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	now := time.Now()
	for name, a := range map[string]struct {
		expires time.Duration
		banned  bool
	}{"a": {time.Hour, false}, "b": {-time.Hour, false}, "over": {-3 * time.Hour, false}, "banned": {time.Hour, true}, "c": {time.Minute, false}} {
		f.agents = append(f.agents, &types.Agent{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/" + name}, X509SvidExpiresAt: now.Add(a.expires).Unix(), Banned: a.banned})
	}
	figures, broken := prom.Figures{}, error(nil)
	var asked []string
	b := f.serve(spire.Config{X509Life: 2 * time.Hour, Figures: figuresFunc(func(x509ID, jwtID string, expected []string) (prom.Figures, error) {
		slices.Sort(expected)
		asked = append(asked, fmt.Sprintf("%s %s %s", x509ID, jwtID, expected))
		return figures, broken
	})})
	active, old := startAt(t, f, b, "tainted")
	asked = nil
	figures = prom.Figures{
		Expected: 5, Missing: 2, Holding: 4, X509SVIDs: 7, JWTExpiry: now.Add(time.Hour),
		Agents: []prom.Agent{{Up: true, Sequence: f.sequence}, {Up: true, Sequence: f.sequence - 1}, {}},
		Holders: []runbook.Holder{{Agent: "a", SVIDs: 7, Reason: "renewing"}, {Agent: "b", Reason: "silent"},
			{Agent: "2 of 5", Reason: "silent"}},
	}
	s := wantRows(t, b, "Tainted/Tainted Active/Active")
	if s.Agents != 5 || s.AgentsBehind != 4 {
		t.Errorf("%d agents, %d behind", s.Agents, s.AgentsBehind)
	}
	k := s.Keysets[0]
	if k.X509SVIDs != 7 || k.X509Safe || k.JWTSafe || k.Unknown != "" || !k.JWTExpiry.Equal(figures.JWTExpiry) {
		t.Errorf("keyset %+v", k)
	}
	if want := fmt.Sprintf("%s %s [spiffe://example.org/spire/agent/a spiffe://example.org/spire/agent/b spiffe://example.org/spire/agent/c]", k.X509AuthorityID, k.JWTKeyID); asked[0] != want {
		t.Errorf("asked for %q, want %q", asked[0], want)
	}
	if h, err := b.Holders(t.Context(), old); err != nil || len(h) != 3 {
		t.Errorf("holders %v, %v", h, err)
	}
	if h, err := b.Holders(t.Context(), active); err != nil || len(h) != 1 || h[0].Reason != "signing" {
		t.Errorf("holders of the active one %v, %v", h, err)
	}
	if _, err := b.Holders(t.Context(), "ks_unknown"); !errors.Is(err, refusal.ErrNotFound) {
		t.Errorf("holders of none: %v", err)
	}
	f.takeCalls()
	err := b.Remove(t.Context(), old, false)
	if notSafe, ok := errors.AsType[*runbook.NotSafeError](err); !ok || notSafe.Keyset != old || err.Error() != "4 of 5 agents may still hold X.509-SVIDs of "+old {
		t.Errorf("remove an unsafe keyset: %v", err)
	}
	broken = errors.New("Prometheus is gone")
	s = wantRows(t, b, "Tainted/Tainted Active/Active")
	if k := s.Keysets[0]; k.Unknown != "Prometheus is gone" || k.X509SVIDs >= 0 || k.X509Safe || k.JWTSafe || s.Agents != 3 || s.AgentsBehind >= 0 {
		t.Errorf("without figures: %+v of %+v", k, s)
	}
	if err := b.Remove(t.Context(), old, false); err == nil || err.Error() != "Prometheus is gone" {
		t.Errorf("remove without figures: %v", err)
	}
	if calls := f.takeCalls(); calls != "" {
		t.Error("calls:", calls)
	}
	broken, figures = nil, prom.Figures{X509Safe: true, JWTSafe: true, Expected: 3}
	if k := wantRows(t, b, "Tainted/Tainted Active/Active").Keysets; !k[0].X509Safe || !k[0].JWTSafe || k[1].X509Safe || k[1].JWTSafe {
		t.Errorf("safe: %+v", k)
	}
	must(t, b.Remove(t.Context(), old, false))
	wantRows(t, b, "Active/Active")
}

func TestWithoutFigures(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.agents = []*types.Agent{{X509SvidExpiresAt: time.Now().Add(time.Hour).Unix()}}
	b := f.serve(spire.Config{})
	_, old := startAt(t, f, b, "tainted")
	s := wantRows(t, b, "Tainted/Tainted Active/Active")
	if k := s.Keysets[0]; !strings.Contains(k.Unknown, "--prometheus") || k.X509SVIDs >= 0 || k.X509Safe || k.JWTSafe || s.Agents != 1 || s.AgentsBehind >= 0 {
		t.Errorf("%+v of %+v", k, s)
	}
	if err := b.Remove(t.Context(), old, false); err == nil || !strings.Contains(err.Error(), "--prometheus") {
		t.Errorf("remove: %v", err)
	}
	if _, err := b.Holders(t.Context(), old); err == nil || !strings.Contains(err.Error(), "--prometheus") {
		t.Errorf("holders: %v", err)
	}
	must(t, b.Remove(t.Context(), old, true))
}
