package server_test

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server"
)

// backup returns a backup of a running domain.
func (r *running) backup() (data []byte) {
	r.t.Helper()
	stream, err := r.api.Backup(r.t.Context(), &api.BackupRequest{})
	check(r.t, err)
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return data
		}
		check(r.t, err)
		data = append(data, part.GetData()...)
	}
}

// restored stops a domain and runs another on a backup.
func (r *running) restored(data []byte) *running {
	r.t.Helper()
	r.stop()
	check(r.t, os.WriteFile(filepath.Join(r.config.DataDir, server.FileName), data, 0o600))
	return run(r.t, r.config)
}

// settled reports that the agent has replaced every SVID of a tainted authority.
func (a *agent) settled(r *running, authority string) {
	a.t.Helper()
	_, err := a.Report(a.t.Context(), &api.ReportRequest{
		BundleSequence: r.Published().Sequence, TaintRate: 20,
		Authorities: []*api.AuthorityReport{{AuthorityId: authority, Tainted: true, Settled: true}},
	})
	check(a.t, err)
}

// TestRestore restores a backup after further changes. A keyset of the backup is not
// safe to remove, whatever agents report, because the server does not know what else it
// signed. A keyset made after the restore is not affected.
func TestRestore(t *testing.T) {
	t.Parallel()
	r := run(t, newConfig(t, "east", "west"))
	ctx, s := t.Context(), scope("east")
	r.put("east", "web", "/web")
	before := r.join("east")
	before.workload("web")
	spent := r.token("east")
	old := r.keysets("east").GetKeysets()[0]
	taken := time.Now()
	data := r.backup()

	// An agent that the backup does not have, with SVIDs of the backup's keyset and of a
	// later one; and a sequence number that agents have seen.
	after := r.attest("east", spent)
	after.workload("web")
	after.token("web")
	r.rotate("east")
	r.put("east", "later", "/later")
	lost := after.workload("web")
	published := r.Published().Sequence

	r = r.restored(data)
	got := r.keysets("east")
	if k := got.GetKeysets(); len(k) != 1 || k[0].GetId() != old.GetId() || k[0].GetState() != api.KeysetState_ACTIVE {
		t.Fatalf("keysets %v", k)
	}
	if got.GetSequence() <= published {
		t.Errorf("the sequence is %d, agents have seen %d", got.GetSequence(), published)
	}
	if list, err := r.api.ListEntries(ctx, &api.ListEntriesRequest{Scope: s}); err != nil || len(list.GetEntries()) != 1 {
		t.Errorf("entries %v, %v", list, err)
	}
	before = r.dial("east", before.identity)
	if svid := before.workload("web"); svid.chain[0].Issuer.CommonName != old.GetId() {
		t.Errorf("signed by %v", svid.chain[0].Issuer)
	}
	bundle, trust := before.bundle()
	if bundle.GetSequenceNumber() != got.GetSequence() {
		t.Errorf("the bundle is %d", bundle.GetSequenceNumber())
	}
	for _, authority := range trust.X509Authorities() {
		if lost.chain[0].CheckSignatureFrom(authority) == nil {
			t.Error("an SVID of a lost keyset still verifies")
		}
	}
	if _, err := r.dial("east", after.identity).PostStatus(ctx, &agentv1.PostStatusRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("unknown agent: %v", err)
	}
	if stream, err := r.dial("east", nil).AttestAgent(ctx); err != nil {
		t.Error(err)
	} else {
		_, csr := newKey(t)
		check(t, stream.Send(attestation(spent, csr)))
		if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "is not known to this deployment") {
			t.Errorf("spent token: %v", err)
		}
	}

	// The keyset is replaced, and every known agent has renewed all its SVIDs.
	r.rotate("east")
	before.workload("web")
	before.settled(r, old.GetX509AuthorityId())
	k := r.keysets("east").GetKeysets()[0]
	if k.GetX509Safe() || k.GetJwtSafe() || k.GetLiveX509Svids() != 0 || !k.GetJwtLatestExpiry().AsTime().Equal(old.GetExpiresAt().AsTime()) {
		t.Errorf("the old keyset: %v", k)
	}
	holders, err := r.api.ListHolders(ctx, &api.ListHoldersRequest{Scope: s, KeysetId: old.GetId()})
	check(t, err)
	week := time.Now().Add(168 * time.Hour)
	if h := holders.GetHolders(); len(h) != 1 || h[0].GetReason() != "restored" || h[0].GetAgentId() != "" || h[0].GetLastReport().AsTime().Before(taken) ||
		h[0].GetLastReport().AsTime().After(taken.Add(time.Minute)) || h[0].GetLatestExpiry().AsTime().Before(week.Add(-5*time.Minute)) || h[0].GetLatestExpiry().AsTime().After(week) {
		t.Errorf("held by %v", h)
	}
	_, err = r.api.RemoveKeyset(ctx, &api.RemoveKeysetRequest{Scope: s, KeysetId: old.GetId()})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "restored from a copy of "+holders.GetHolders()[0].GetLastReport().AsTime().Format(time.DateTime)) ||
		!strings.Contains(err.Error(), "not known and may be in use until "+holders.GetHolders()[0].GetLatestExpiry().AsTime().Format(time.DateTime)) {
		t.Errorf("removed: %v", err)
	}
	text := string(get(t, http.DefaultClient, "http://"+r.address("metrics.address")+"/metrics", http.StatusOK))
	if want := `renewd_server_keyset_safe{deployment="east",keyset="` + old.GetId() + `",svid_type="x509"} 0`; !strings.Contains(text, want) {
		t.Errorf("the metrics do not say %s", want)
	}

	// The same holds after another restart. A keyset made since the restore is safe.
	r.stop()
	r = run(t, r.config)
	before = r.dial("east", before.identity)
	before.settled(r, old.GetX509AuthorityId())
	second := r.rotate("east")
	all := r.keysets("east").GetKeysets()
	for _, k := range all {
		if k.GetId() == second {
			before.settled(r, k.GetX509AuthorityId())
		}
	}
	for _, k := range r.keysets("east").GetKeysets() {
		if want := k.GetId() == second; k.GetX509Safe() != want {
			t.Errorf("%s: safe is %v", k.GetId(), k.GetX509Safe())
		}
	}
	_, err = r.api.RemoveKeyset(ctx, &api.RemoveKeysetRequest{Scope: s, KeysetId: second})
	check(t, err)
	_, err = r.api.RemoveKeyset(ctx, &api.RemoveKeysetRequest{Scope: s, KeysetId: old.GetId(), Force: true})
	check(t, err)
	audit, err := r.api.ReadAudit(ctx, &api.ReadAuditRequest{Scope: s})
	check(t, err)
	var notes []string
	for _, rec := range audit.GetRecords() {
		if rec.GetKind() == "backups" || rec.GetKind() == "keysets" && rec.GetNote() != "" {
			notes = append(notes, rec.GetActor()+" "+rec.GetOperation()+" "+rec.GetNote())
		}
	}
	if len(notes) != 3 || !strings.HasSuffix(notes[0], " backup ") || !strings.HasPrefix(notes[1], "server restore from a copy of ") || !strings.Contains(notes[2], "remove forced: the server was restored from a copy of ") {
		t.Errorf("audit log: %q", notes)
	}
}
