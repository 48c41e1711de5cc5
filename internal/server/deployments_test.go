package server_test

import (
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/rotation"
)

func verifies(ident *identity, b *spiffebundle.Bundle) error {
	_, _, err := x509svid.Verify(ident.chain, b)
	return err
}

func (a *agent) token(entry string) string {
	a.t.Helper()
	resp, err := a.NewJWTSVID(a.t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: entry, Audience: []string{"a"}})
	check(a.t, err)
	return resp.GetSvid().GetToken()
}

// TestDeploymentsTrustEachOther: two deployments sign with their own keysets, and the
// agents of each get the authorities of both.
func TestDeploymentsTrustEachOther(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "east", "west"))
	agents := map[string]*agent{}
	for _, name := range []string{"east", "west"} {
		r.put(name, "web", "/"+name)
		agents[name] = r.join(name)
	}
	both := func() *spiffebundle.Bundle {
		t.Helper()
		b, east := agents["east"].bundle()
		if w, _ := agents["west"].bundle(); !proto.Equal(b, w) {
			t.Fatalf("the bundles differ: %v, %v", b, w)
		}
		return east
	}
	trust := both()
	if x, j := len(trust.X509Authorities()), len(trust.JWTAuthorities()); x != 2 || j != 2 {
		t.Fatalf("%d and %d authorities", x, j)
	}
	workloads := map[string]*identity{}
	for name, a := range agents {
		workloads[name] = a.workload("web")
		if want := "/" + name; workloads[name].id.Path() != want {
			t.Errorf("%s: got %v", name, workloads[name].id)
		}
		check(t, verifies(workloads[name], trust))
		if _, err := jwtsvid.ParseAndValidate(a.token("web"), trust, []string{"a"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Trusted is not authorized: agents and entries belong to one deployment.
	foreign := r.dial("west", agents["east"].identity)
	if _, err := foreign.PostStatus(t.Context(), &agentv1.PostStatusRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an agent of east at west: %v", err)
	}

	// The agents of both verify what either signs, so an operator waits for all.
	for _, name := range []string{"east", "west"} {
		if list := r.keysets(name); list.GetAgents() != 2 || list.GetAgentsBehind() != 2 {
			t.Errorf("%s: %d agents, %d behind; want 2 and 2", name, list.GetAgents(), list.GetAgentsBehind())
		}
	}

	before, _ := agents["west"].bundle()
	west := r.keysets("west").GetKeysets()
	old := r.rotate("east")
	both()
	after, _ := agents["west"].bundle()
	var tainted []string
	for _, a := range after.GetJwtAuthorities() {
		if a.GetTainted() {
			tainted = append(tainted, a.GetKeyId())
		}
	}
	var want string
	for _, k := range r.keysets("east").GetKeysets() {
		if k.GetId() == old {
			want = k.GetJwtKeyId()
		}
	}
	if len(after.GetX509Authorities()) != 3 || after.GetSequenceNumber() != before.GetSequenceNumber()+2 || !slices.Equal(tainted, []string{want}) {
		t.Errorf("after a taint of %s at east, west's agents get %v", want, after)
	}
	if now := r.keysets("west").GetKeysets(); len(now) != 1 || now[0].GetId() != west[0].GetId() || now[0].GetState() != api.KeysetState_ACTIVE {
		t.Errorf("keysets of west: %v", now)
	}
	all, err := r.api.GetBundle(t.Context(), &api.GetBundleRequest{})
	check(t, err)
	if n := strings.Count(string(all.GetPem()), "BEGIN"); n != 3 || all.GetSequence() != after.GetSequenceNumber() {
		t.Errorf("operators get %d authorities, sequence %d", n, all.GetSequence())
	}

	trust = both()
	check(t, verifies(workloads["east"], trust))
	check(t, verifies(agents["east"].workload("web"), trust))
	_, err = r.api.RemoveKeyset(t.Context(), &api.RemoveKeysetRequest{Scope: scope("east"), KeysetId: old, Force: true})
	check(t, err)
	trust = both()
	if verifies(workloads["east"], trust) == nil {
		t.Error("west's workloads trust a keyset that was removed at east")
	}
	check(t, verifies(workloads["west"], trust))
}

// stored returns all that a restart must not change, as text.
func (r *running) stored() string {
	r.t.Helper()
	var out strings.Builder
	ctx := r.t.Context()
	for _, name := range []string{"east", "west"} {
		s := scope(name)
		keysets := r.keysets(name)
		keysets.AgentsBehind, keysets.Automatic, keysets.Clock = 0, nil, nil // known after a minute, or different each time
		keysets.Behind, keysets.ServerStartedAt = nil, nil
		keysets.Agents = 0 // counts all served deployments; the list below is for each
		entries, err := r.api.ListEntries(ctx, &api.ListEntriesRequest{Scope: s})
		check(r.t, err)
		agents, err := r.api.ListAgents(ctx, &api.ListAgentsRequest{Scope: s})
		check(r.t, err)
		agents.ServerStartedAt = nil
		for _, a := range agents.GetAgents() {
			a.AppliedSequence, a.LastReport = 0, nil
		}
		audit, err := r.api.ReadAudit(ctx, &api.ReadAuditRequest{Scope: s})
		check(r.t, err)
		for _, m := range []proto.Message{keysets, entries, agents, audit} {
			fmt.Fprintf(&out, "%s %T: %s\n", name, m, canonical(m))
		}
	}
	return out.String()
}

// canonical returns a message as text, without the random spaces of prototext.
func canonical(m proto.Message) string {
	return strings.Join(strings.Fields(prototext.Format(m)), " ")
}

// TestRestart restarts the server on the same store, also with one deployment no longer
// configured, and then with both again.
func TestRestart(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east", "west")
	r := run(t, c)
	ident := map[string]*identity{}
	tokens := map[string]string{}
	for i, name := range []string{"east", "west"} {
		r.put(name, "web", "/"+name)
		a := r.join(name)
		ident[name], tokens[name] = a.identity, r.token(name)
		for range i + 1 {
			a.workload("web")
			a.token("web")
			r.rotate(name)
		}
		_, err := a.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "7." + name, CurrentBundleSerial: 3})
		check(t, err)
	}
	want, sequence, pem := r.stored(), r.Published().Sequence, string(r.Published().PEM())
	if !strings.Contains(want, "live_x509_svids: 2") || !strings.Contains(want, "7.west") || !strings.Contains(want, "unix:uid:") {
		t.Fatalf("too little is stored:\n%s", want)
	}
	same := func() {
		t.Helper()
		got := strings.Split(r.stored(), "\n")
		for i, line := range strings.Split(want, "\n") {
			if got[i] != line {
				t.Errorf("after a restart\n%s\nbefore it\n%s", got[i], line)
			}
		}
		if got := r.Published(); got.Sequence != sequence || string(got.PEM()) != pem {
			t.Errorf("published: %v", got)
		}
		check(t, r.Ready())
	}

	r.stop()
	r = run(t, c)
	same()
	for name := range ident {
		r.dial(name, ident[name]).workload("web")
	}
	want = r.stored()

	// West is not configured: it is not served, and its authorities are still trusted.
	r.stop()
	c.Rotation.Mode = "on"
	r = run(t, served(c, "east"))
	same()
	if r.Server("west") != nil || r.start.addresses["deployments.west.listen_address"] != "" {
		t.Error("west is served")
	}
	if n := r.keysets("east").GetAgents(); n != 1 {
		t.Errorf("east waits for %d agents, want only its own: west is not served", n)
	}
	if mode := r.keysets("east").GetAutomatic().GetMode(); mode != "on" {
		t.Errorf("automatic rotation of east is %q", mode)
	}
	if a := r.keysets("west").GetAutomatic(); a.GetMode() != "off" || a.GetNext() != "" {
		t.Errorf("automatic rotation of west: %v", a)
	}
	r.stop()
	c.Rotation.Mode = "off"
	r = run(t, c)
	same()
	for name := range ident {
		r.dial(name, ident[name]).workload("web")
		r.attest(name, tokens[name])
	}
}

// shifted returns the real clock, ahead by a duration.
func shifted(by time.Duration) func() time.Time {
	return func() time.Time { return time.Now().Add(by) }
}

// TestNoLongerServed: a deployment that is not served needs no valid keyset, and
// operators do not find it in the list of deployments.
func TestNoLongerServed(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east", "west")
	r := run(t, c)
	r.stop()
	c = served(c, "east")
	c.Now, c.Rotation.Mode = shifted(91*day), rotation.On
	r = run(t, c)
	resp, err := r.api.ListDeployments(t.Context(), &api.ListDeploymentsRequest{})
	check(t, err)
	if got := resp.GetDeployments(); !slices.Equal(got, []string{"east"}) {
		t.Errorf("deployments %q", got)
	}
	// It is shown by its name.
	if n := len(r.keysets("west").GetKeysets()); n != 1 {
		t.Errorf("%d keysets of west", n)
	}
}

// TestExpiredBesideAnother: if one deployment cannot sign, another one signs the
// certificate for relying parties and remote operators.
func TestExpiredBesideAnother(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east")
	r := run(t, c)
	r.stop()
	c = served(c, "east", "west")
	c.Now = shifted(91 * day)
	r = run(t, c)
	if err := r.Ready(); err == nil {
		t.Error("east has not expired")
	}
	for _, field := range []string{"bundle_endpoint.address", "operators.address"} {
		conn, err := tls.Dial("tcp", r.address(field), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Errorf("%s: %v", field, err)
			continue
		}
		conn.Close()
	}
}

// TestRestartBeforeActivation: after a restart automatic rotation waits for agents that
// have not had the time to report that they have applied the bundle.
func TestRestartBeforeActivation(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east")
	c.KeysetLifetime, c.X509TTL = 30*time.Hour, 29*time.Hour
	c.Rotation = rotation.Policy{Mode: rotation.On, PreparationThreshold: 10 * time.Hour, ActivationThreshold: time.Minute}
	r := run(t, c)
	r.join("east")
	r.stop()
	var later atomic.Int64 // than the real clock
	begin := time.Now()
	c.Now = func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	c.Uptime = func() time.Duration { return time.Since(begin) + time.Duration(later.Load()) }
	later.Store(int64(21 * time.Hour))
	r = run(t, c)
	states := func() string {
		var all []string
		for _, k := range r.keysets("east").GetKeysets() {
			all = append(all, k.GetState().String())
		}
		return strings.Join(all, " ")
	}
	for deadline := time.Now().Add(2 * time.Minute); states() != "ACTIVE PREPARED"; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(states())
		}
	}
	r.stop()
	r = run(t, c)
	later.Add(int64(2 * time.Minute))
	if a := r.keysets("east").GetAutomatic(); a.GetWaitsFor() != "1 agent that has not applied the trust bundle" || states() != "ACTIVE PREPARED" {
		t.Errorf("two minutes after the start: %v, %s", a, states())
	}
	later.Add(int64(4 * time.Minute))
	if a := r.keysets("east").GetAutomatic(); a.GetWaitsFor() != "" || !strings.HasPrefix(a.GetNext(), "activate ") {
		t.Errorf("four minutes later: %v", a)
	}
}
