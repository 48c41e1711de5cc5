package spireapi_test

import (
	"context"
	"errors"
	"math"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

func (c *client) report(ctx context.Context, req *api.ReportRequest) error {
	_, err := api.NewFleetClient(c.ClientConn).Report(ctx, req)
	return err
}

func TestReport(t *testing.T) {
	t.Parallel()
	b := newFakeLedger()
	bubble(t, spireapi.Config{Ledger: b}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		begins := time.Now().Add(30 * time.Second).UTC()
		err := c.report(t.Context(), &api.ReportRequest{
			BundleSequence: 7, TaintRate: 20, Process: []byte("p"), Number: 3,
			Authorities: []*api.AuthorityReport{
				{AuthorityId: "old", Tainted: true, Pending: 3, Streams: 2, BeginsAt: timestamppb.New(begins)},
				{AuthorityId: "older", Settled: true},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]ledger.Report{caller.id.String(): {
			Sequence: 7, Rate: 20, Process: "p", Number: 3,
			Authorities: []ledger.AuthorityReport{
				{Authority: "old", Tainted: true, Pending: 3, Streams: 2, BeginsAt: begins},
				{Authority: "older", Settled: true},
			},
		}}
		if !reflect.DeepEqual(b.reports, want) {
			t.Errorf("reports are %+v, want %+v", b.reports, want)
		}
		b.set(func(context.Context) error { return errors.New("disk full") })
		wantCode(t, c.report(t.Context(), &api.ReportRequest{}), codes.Unavailable)
	})
}

// TestReportsOfAClone: a node and its clone, with the same SVID and each on its own
// connection, report that they have replaced everything.
func TestReportsOfAClone(t *testing.T) {
	t.Parallel()
	l := openLedger(t)
	bubble(t, spireapi.Config{Ledger: l}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		old := s.Keysets().Active()
		next, err := s.Keysets().Prepare(t.Context())
		check(t, err)
		check(t, s.Keysets().Activate(t.Context(), next.ID))
		check(t, s.Keysets().Taint(t.Context(), old.ID))
		node, clone := s.dial(t, caller), s.dial(t, caller)
		settled := func(c *client, process string, number uint64) {
			t.Helper()
			check(t, c.report(t.Context(), &api.ReportRequest{Process: []byte(process), Number: number, Authorities: []*api.AuthorityReport{
				{AuthorityId: old.X509AuthorityID, Tainted: true, Settled: true},
			}}))
			if l.X509(old.X509AuthorityID, true).Clear {
				t.Errorf("safe by the report of %s", process)
			}
		}
		check(t, node.report(t.Context(), &api.ReportRequest{Process: []byte("node"), Number: 1}))
		for i := range uint64(10) {
			settled(clone, "clone", i+1)
			settled(node, "node", i+2)
			time.Sleep(time.Minute)
		}
		if got := l.Duplicated(); len(got) != 1 || got[0] != caller.id.String() {
			t.Errorf("duplicated are %v", got)
		}
		check(t, s.EvictAgent(t.Context(), caller.id, true))
		if got := l.Duplicated(); len(got) > 0 || !l.X509(old.X509AuthorityID, true).Clear {
			t.Errorf("evicted and gone: duplicated are %v, %+v", got, l.X509(old.X509AuthorityID, true))
		}
	})
}

// TestReportIsForAgents: other callers are refused, and an agent reports on itself
// only.
func TestReportIsForAgents(t *testing.T) {
	t.Parallel()
	b := newFakeLedger()
	bubble(t, spireapi.Config{Ledger: b}, func(t *testing.T, s *running) {
		wantCode(t, s.dial(t, nil).report(t.Context(), &api.ReportRequest{}), codes.PermissionDenied, notAttested)

		key, _ := newKey(t)
		for _, path := range []string{"/workload", "/spire/agent/join_token/guessed"} {
			svid, err := s.Keysets().SignX509(spiffeid.RequireFromPath(td, path), key.Public(), 0)
			if err != nil {
				t.Fatal(err)
			}
			caller := newIdentity(t, &types.X509SVID{CertChain: [][]byte{svid.DER}, Id: &types.SPIFFEID{Path: path}}, key)
			wantCode(t, s.dial(t, caller).report(t.Context(), &api.ReportRequest{}), codes.PermissionDenied, notAttested)
		}

		one, oneConn := s.join(t)
		two, twoConn := s.join(t)
		for i, c := range []*client{oneConn, twoConn} {
			if err := c.report(t.Context(), &api.ReportRequest{BundleSequence: uint64(i + 1)}); err != nil {
				t.Fatal(err)
			}
		}
		if b.reports[one.id.String()].Sequence != 1 || b.reports[two.id.String()].Sequence != 2 {
			t.Errorf("reports are %v", b.reports)
		}
		if err := s.BanAgent(t.Context(), one.id); err != nil {
			t.Fatal(err)
		}
		wantCode(t, oneConn.report(t.Context(), &api.ReportRequest{BundleSequence: 9}), codes.PermissionDenied, banned)
		if len(b.reports) != 2 || b.reports[one.id.String()].Sequence != 1 {
			t.Errorf("reports are %v", b.reports)
		}
	})
}

func TestReportRefuses(t *testing.T) {
	t.Parallel()
	b := newFakeLedger()
	bubble(t, spireapi.Config{Ledger: b}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		of := func(all ...*api.AuthorityReport) *api.ReportRequest { return &api.ReportRequest{Authorities: all} }
		many := make([]*api.AuthorityReport, 65)
		for i := range many {
			many[i] = &api.AuthorityReport{AuthorityId: strings.Repeat("é", i+1)}
		}
		if err := c.report(t.Context(), of(many[:64]...)); err != nil {
			t.Errorf("64 authorities: %v", err)
		}
		if err := c.report(t.Context(), of(&api.AuthorityReport{AuthorityId: strings.Repeat("é", 128)})); err != nil {
			t.Errorf("an ID of 128 characters: %v", err)
		}
		clear(b.reports)
		good := &api.AuthorityReport{AuthorityId: "good"}
		for _, tt := range []struct {
			field string
			req   *api.ReportRequest
		}{
			{"taint_rate", &api.ReportRequest{TaintRate: -1}},
			{"taint_rate", &api.ReportRequest{TaintRate: math.NaN()}},
			{"taint_rate", &api.ReportRequest{TaintRate: math.Inf(1)}},
			{"process", &api.ReportRequest{Process: make([]byte, 65)}},
			{"authorities", of(many...)},
			{"authorities[1].authority_id", of(good, &api.AuthorityReport{})},
			{"authorities[1].authority_id", of(good, good)},
			{"authorities[0].authority_id", of(&api.AuthorityReport{AuthorityId: strings.Repeat("x", 129)})},
			{"authorities[1].pending", of(good, &api.AuthorityReport{AuthorityId: "x", Pending: -1})},
			{"authorities[1].pending", of(good, &api.AuthorityReport{AuthorityId: "x", Pending: math.MaxInt64})},
			{"authorities[1].streams", of(good, &api.AuthorityReport{AuthorityId: "x", Streams: -1})},
			{"authorities[1].streams", of(good, &api.AuthorityReport{AuthorityId: "x", Streams: math.MaxInt64})},
			{"authorities[0].begins_at", of(&api.AuthorityReport{AuthorityId: "x", BeginsAt: &timestamppb.Timestamp{Nanos: -1}})},
		} {
			err := c.report(t.Context(), tt.req)
			wantCode(t, err, codes.InvalidArgument)
			if text := status.Convert(err).Message(); !strings.HasPrefix(text, tt.field+": ") {
				t.Errorf("the error of %s is %q", tt.field, text)
			}
		}
		if len(b.reports) > 0 {
			t.Errorf("stored all the same: %v", b.reports)
		}
	})
}

// writes is a storage that counts the updates of agents.
type writes struct {
	*memory.Server
	n atomic.Int64
}

func (w *writes) UpdateAgent(ctx context.Context, id spiffeid.ID, change func(*spireapi.Agent) (*spireapi.Agent, error), audit ...*spireapi.AuditRecord) (*spireapi.Agent, error) {
	w.n.Add(1)
	return w.Server.UpdateAgent(ctx, id, change, audit...)
}

// TestHostnameIsKept: storage is written for a new hostname only, and what cannot be one is
// refused.
func TestHostnameIsKept(t *testing.T) {
	t.Parallel()
	store := &writes{Server: memory.NewServer()}
	bubble(t, spireapi.Config{Storage: store}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		before := store.n.Load()
		for i, name := range []string{"node-1", "node-1", "", "node-1", "node-2"} {
			check(t, c.report(t.Context(), &api.ReportRequest{Hostname: name, Number: uint64(i)}))
		}
		a, err := store.Agent(t.Context(), caller.id)
		if n := store.n.Load() - before; err != nil || a.Hostname != "node-2" || n != 2 {
			t.Errorf("%+v, %v after %d writes", a, err, n)
		}
		wantCode(t, c.report(t.Context(), &api.ReportRequest{Hostname: strings.Repeat("ä", 256)}), codes.InvalidArgument)
		check(t, c.report(t.Context(), &api.ReportRequest{Hostname: strings.Repeat("ä", 255)}))
	})
}

// TestPostStatusReachesLedger posts as an agent does each minute: storage is written
// only for a new version.
func TestPostStatusReachesLedger(t *testing.T) {
	t.Parallel()
	b, store := newFakeLedger(), &writes{Server: memory.NewServer()}
	bubble(t, spireapi.Config{Ledger: b, Storage: store}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		post := func(version string, sequence uint64) {
			t.Helper()
			if _, err := c.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: version, CurrentBundleSerial: sequence}); err != nil {
				t.Fatal(err)
			}
		}
		post("1.0", 0)
		if sequence, heard := b.applied[caller.id.String()]; !heard || sequence > 0 {
			t.Errorf("status without a bundle: contact %v, applies %d", heard, sequence)
		}
		before := store.n.Load()
		for i := range 10 {
			post("1.0", uint64(i+1))
		}
		if n := store.n.Load() - before; n != 0 || b.applied[caller.id.String()] != 10 {
			t.Errorf("%d writes; applied is %v", n, b.applied)
		}
		post("1.1", 10)
		if a, err := store.Agent(t.Context(), caller.id); err != nil || a.Version != "1.1" || store.n.Load() != before+1 {
			t.Errorf("%v, %v after %d writes", a, err, store.n.Load()-before)
		}
	})
}
