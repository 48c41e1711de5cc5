package store_test

import (
	"encoding/base64"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// TestFormat reads values of version 1 of the format after an upgrade. A field that is
// renamed in another package needs a JSON name here, or a new version of the format.
func TestFormat(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path)
	if err := s.Deployment("default").PutToken(t.Context(), spireapi.Token{Value: "token", ExpiresAt: start}); err != nil {
		t.Fatal(err)
	}
	closed(t, s)
	sealed := func(plaintext, context string) string {
		s, err := key.Seal([]byte(plaintext), []byte(strings.ReplaceAll(context, "|", "\x00")))
		if err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(s)
	}
	edit(t, path, func(tx *bbolt.Tx) error {
		d := tx.Bucket([]byte("deployments")).Bucket([]byte("default"))
		for _, v := range [][3]string{
			{"agents", "spiffe://example.org/a", `{"ID":"spiffe://example.org/a","Type":"join_token","Serial":"1","ExpiresAt":"2026-01-02T03:04:05.000000678Z","NextSerial":"2","NextExpiresAt":"2026-01-02T03:04:05.000000678Z","Banned":true,"Version":"1.2"}`},
			{"agents", "spiffe://example.org/b", `{"ID":"spiffe://example.org/b","Type":"x509pop","Selectors":[{"Type":"x509pop","Value":"subject:cn:b"}],"Reattestable":true,"Serial":"3","ExpiresAt":"2026-01-02T03:04:05.000000678Z","NextSerial":"","NextExpiresAt":"0001-01-01T00:00:00Z","Banned":false,"Version":""}`},
			{"audit", "\x00\x00\x00\x00\x00\x00\x00\x01", `{"Number":1,"At":"2026-01-02T03:04:05.000000678Z","Actor":"uid 0","Operation":"taint","KeysetID":"ks_a","Before":{"ks_a":"PREPARED"},"After":{"ks_a":"TAINTED"},"Note":"n"}`},
			{"entries", "e", `{"ID":"e","SPIFFEID":"spiffe://example.org/w","ParentID":"spiffe://example.org/a","Selectors":[{"Type":"unix","Value":"uid:0"}],"Hint":"h","FederatesWith":["example.net"],"X509TTL":3600000000000,"JWTTTL":1000000000,"Revision":7,"CreatedAt":"2026-01-02T03:04:05.000000678Z"}`},
			{"entries", "f", `{"ID":"f","SPIFFEID":"spiffe://example.org/w","ParentID":"","Selectors":null,"Hint":"","FederatesWith":null,"DNSNames":["b.example.org","a.example.org"],"X509TTL":0,"JWTTTL":0,"Revision":8,"CreatedAt":"2026-01-02T03:04:05.000000678Z"}`},
			{"entries", "g", `{"ID":"g","SPIFFEID":"spiffe://example.org/w","ParentID":"","Selectors":null,"Hint":"","FederatesWith":null,"DNSNames":null,"X509TTL":0,"JWTTTL":0,"DisableX509SVIDPrefetch":true,"JWTSVIDIncludeJTI":true,"Revision":9,"CreatedAt":"2026-01-02T03:04:05.000000678Z"}`},
			{"entries", "h", `{"ID":"h","SPIFFEID":"spiffe://example.org/w","ParentID":"spiffe://example.org/spire/server","Selectors":null,"Hint":"","FederatesWith":null,"DNSNames":null,"X509TTL":0,"JWTTTL":0,"ExpiresAt":"2026-01-02T03:04:05.000000678Z","Revision":10,"CreatedAt":"2026-01-02T03:04:05.000000678Z"}`},
			{"keysets", "document", `{"Version":3,"Sequence":5,"RotatedAt":"2026-01-02T03:04:05.000000678Z","Records":[{"ID":"ks_a","State":"TAINTED","IssuedAt":"2026-01-02T03:04:05.000000678Z","ExpiresAt":"2026-01-02T03:04:05.000000678Z","SteppedDownAt":"2026-01-02T03:04:05.000000678Z","SteppedDownBy":"scheduler","TaintedAt":"2026-01-02T03:04:05.000000678Z","CA":"AQ==","CAKey":"` +
				sealed("ca", "renewd signing key|example.org|default|ks_a|X.509") + `","JWTKeyID":"k","JWTKey":"` + sealed("jwt", "renewd signing key|example.org|default|ks_a|JWT") + `"}]}`},
			{"ledger", "auth\x00spiffe://example.org/a\x00e", "\x00\x00\x00\x00\x69\x57\x35\xa5\x00\x00\x02\xa6"},
			{"jwt", "kid", "\x00\x00\x00\x00\x69\x57\x35\xa5\x00\x00\x02\xa6"},
		} {
			if err := d.Bucket([]byte(v[0])).Put([]byte(v[1]), store.Pack([]byte(v[1]), []byte(v[2]))); err != nil {
				return err
			}
		}
		about := tx.Bucket([]byte("about"))
		if err := about.Put([]byte("store"), store.Pack([]byte("store"), []byte(`{"format":1,"trust_domain":"example.org"}`))); err != nil {
			return err
		}
		return about.Put([]byte("restored"), store.Pack([]byte("restored"), []byte(
			`{"At":"2026-01-02T03:04:06Z","CopiedAt":"2026-01-02T03:04:05.000000678Z","Deployments":{"default":{"CopiedAt":"2026-01-02T03:04:05.000000678Z","X509":{"auth":"2026-01-09T03:04:06Z"},"JWT":{"kid":"2026-01-02T03:04:05.000000678Z"}}}}`)))
	})
	closed(t, at(t, path, start, nil)) // upgrades it
	s = at(t, path, start, nil)
	defer closed(t, s)
	d := s.Deployment("default")
	check := func(want any, got any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	a := spiffeid.RequireFromString("spiffe://example.org/a")
	agent, err := d.Agent(t.Context(), a)
	check(&spireapi.Agent{ID: a, Type: "join_token", Serial: "1", ExpiresAt: start, NextSerial: "2", NextExpiresAt: start, Banned: true, Version: "1.2"}, agent, err)
	b := spiffeid.RequireFromString("spiffe://example.org/b")
	agent, err = d.Agent(t.Context(), b)
	check(&spireapi.Agent{ID: b, Type: "x509pop", Selectors: []spireapi.Selector{{Type: "x509pop", Value: "subject:cn:b"}}, Reattestable: true, Serial: "3", ExpiresAt: start}, agent, err)
	records, err := d.Audit(t.Context(), 0, 0)
	check([]store.AuditRecord{{Number: 1, Change: keyset.Change{
		At: start, Actor: "uid 0", Operation: "taint", KeysetID: "ks_a", Note: "n",
		Before: map[string]keyset.State{"ks_a": keyset.Prepared}, After: map[string]keyset.State{"ks_a": keyset.Tainted},
	}}}, records, err)
	entries, err := d.Entries(t.Context())
	w := spiffeid.RequireFromString("spiffe://example.org/w")
	check([]spireapi.StoredEntry{{Entry: spireapi.Entry{ // written before entries had DNS names or attributes
		ID: "e", SPIFFEID: w, ParentID: a, Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:0"}},
		Hint: "h", FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("example.net")}, X509TTL: time.Hour, JWTTTL: time.Second,
	}, Revision: 7, CreatedAt: start}, {Entry: spireapi.Entry{
		ID: "f", SPIFFEID: w, DNSNames: []string{"b.example.org", "a.example.org"},
	}, Revision: 8, CreatedAt: start}, {Entry: spireapi.Entry{
		ID: "g", SPIFFEID: w, DisableX509SVIDPrefetch: true, JWTSVIDIncludeJTI: true,
	}, Revision: 9, CreatedAt: start}, {Entry: spireapi.Entry{
		ID: "h", SPIFFEID: w, ParentID: spiffeid.RequireFromString("spiffe://example.org/spire/server"), ExpiresAt: start,
	}, Revision: 10, CreatedAt: start}}, entries, err)
	doc, err := d.Load(t.Context())
	check(keyset.Document{Version: 3, Sequence: 5, RotatedAt: start, Records: []keyset.Record{{
		ID: "ks_a", State: keyset.Tainted, IssuedAt: start, ExpiresAt: start, SteppedDownAt: start, SteppedDownBy: "scheduler", TaintedAt: start,
		CA: []byte{1}, CAKey: []byte("ca"), JWTKeyID: "k", JWTKey: []byte("jwt"),
	}}}, doc, err)
	var got []ledger.Row
	jwt, err := d.LoadLedger(t.Context(), func(r ledger.Row) { got = append(got, r) })
	check([]ledger.Row{{Authority: "auth", Agent: a.String(), Entry: "e", NotAfter: start}}, got, err)
	check(map[string]time.Time{"kid": start}, jwt, err)
	check([]ledger.Restored{{
		CopiedAt: start, X509: map[string]time.Time{"auth": time.Date(2026, 1, 9, 3, 4, 6, 0, time.UTC)}, JWT: map[string]time.Time{"kid": start},
	}}, d.Restored(), nil)
}
