package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

// goodReport returns a report whose promises all hold.
func goodReport() Report {
	s := Seconds(3)
	return Report{
		SVIDs: 10, Workloads: 5, Handshakes: 100, MaxDelay: 10, Delay: 2, waited: 2 * time.Second,
		Renewals: 11, MostPerSecond: 11, confirmed: true,
		Seen: &s, FirstRenewal: &s, InUse: &s, Settled: &s, Agreed: &s,
		JWT: JWT{SameDuringTaint: true, AfterRemoval: "replaced", Replaced: &s},
	}
}

func TestEvaluate(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		broken string
		change func(*Report)
	}{
		{"", func(*Report) {}},
		{"no-gap", func(r *Report) { r.LongestGap = 0.001 }},
		{"no-failed-call", func(r *Report) { r.Failed = 1 }},
		{"no-failed-call", func(r *Report) { r.Handshakes = 0 }},
		{"delay", func(r *Report) { r.waited = 1900 * time.Millisecond }},
		{"delay", func(r *Report) { r.Delay, r.waited = 10, 10*time.Second }},
		{"rate", func(r *Report) { r.MostPerSecond = 21 }},
		{"rate", func(r *Report) { r.Renewals = 0 }},
		{"safe", func(r *Report) { r.confirmed = false }},
		{"safe", func(r *Report) { r.Agreed = nil }},
		{"jwt-kept", func(r *Report) { r.JWT.SameDuringTaint = false }},
		{"jwt-kept", func(r *Report) { r.JWT.FailedRequests = 1 }},
		{"jwt-replaced", func(r *Report) { r.JWT.Replaced = nil }},
		{"finished", func(r *Report) { r.Stuck = "a step: not within 30s" }},
	} {
		r := goodReport()
		c.change(&r)
		r.evaluate()
		if got := strings.Join(r.Broken, ","); got != c.broken || r.OK != (c.broken == "") {
			t.Errorf("broken: %q (ok %v), want %q", got, r.OK, c.broken)
		}
	}
}

// A report of a rotation that ended early can be printed in both formats.
func TestReportOfFailedRotation(t *testing.T) {
	t.Parallel()
	d := &demo{system: &system{fleet: &fleet{}}, screen: &screen{start: time.Now()}, stuck: &stuckError{"the agent joins", stepTimeout}}
	r := d.report()
	var out bytes.Buffer
	if err := r.print(&out, d.screen); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Settled                   never", "BROKEN  finished", "the agent joins: not within 30s"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	if _, err := json.Marshal(r); err != nil {
		t.Error(err)
	}
}

// No line is wider than the terminal, and no word is broken or lost.
func TestWidth(t *testing.T) {
	t.Parallel()
	show := func(width int) []string {
		var out bytes.Buffer
		s := &screen{w: &out, live: true, color: true, start: time.Now(), onWriteError: func() {}, width: func() int { return width }}
		s.text("renewd demo: the keys that sign all identities on a node are replaced while they are in use.", "")
		s.step(1, "PREPARE", "A new key is made and trusted. It signs nothing yet, and everybody has to know it before it does.")
		s.event("agent", "settled 7.5 s after the taint: no SVID of the old key held, no renewal waiting,", "no stream without its replacement")
		r := goodReport()
		r.FirstFailure = "a word that is longer than a line " + strings.Repeat("x", 30)
		r.LongestGap = 1
		r.evaluate()
		if err := r.print(&out, s); err != nil {
			t.Fatal(err)
		}
		s.last = time.Time{} // long ago
		s.progress("SVIDs of the new key " + bar(500, 500) + " 500/500  calls 12345, failed 0  longest without SVID 123ms")
		return strings.Split(out.String(), "\n")
	}
	all := func(rows []string) []string { return strings.Fields(strings.Join(rows[:len(rows)-1], " ")) } // without progress
	want := show(0)
	for _, width := range []int{60, 80, 120} {
		got := show(width)
		for _, row := range got {
			if n := visible(strings.TrimPrefix(row, "\r\x1b[K")); n > width {
				t.Errorf("%d columns for %d: %q", n, width, row)
			}
		}
		// Times may differ.
		if len(all(got)) != len(all(want)) || !slices.Equal(all(got)[20:40], all(want)[20:40]) {
			t.Errorf("at %d columns:\n%s\nwant the words of\n%s", width, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	last := show(80)
	if row := last[len(last)-1]; !strings.HasSuffix(row, "failed 0") {
		t.Errorf("progress at 80 columns: %q", row)
	}
}

// The usage text is the documentation of the JSON report.
func TestUsageNamesEveryField(t *testing.T) {
	t.Parallel()
	r := goodReport()
	r.evaluate()
	r.SafeToRemove = []Safe{{}}
	raw, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	_, fields, _ := strings.Cut(usage, "The fields of the JSON report")
	words := strings.FieldsFunc(fields, func(c rune) bool { return c != '_' && (c < '0' || c > 'z') })
	for dec := json.NewDecoder(bytes.NewReader(raw)); ; {
		token, err := dec.Token()
		if err != nil {
			break
		}
		if name, ok := token.(string); ok && strings.Contains(string(raw), `"`+name+`":`) && !slices.Contains(words, name) {
			t.Errorf("%s is not in the usage text", name)
		}
	}
}

func TestValidity(t *testing.T) {
	t.Parallel()
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(s int) time.Time { return begin.Add(time.Duration(s) * time.Second) }
	type update struct{ now, until int } // until 0: no valid SVID
	for _, c := range []struct {
		what    string
		updates []update
		now     int
		want    time.Duration
	}{
		{"none yet", nil, 100, 0},
		{"denied before the first", []update{{1, 0}}, 100, 0},
		{"the first came late", []update{{1, 0}, {50, 200}}, 100, 0},
		{"always one", []update{{1, 50}, {50, 200}}, 100, 0},
		{"expired", []update{{1, 50}}, 57, 7 * time.Second},
		{"expired for a while", []update{{1, 50}, {53, 200}}, 100, 3 * time.Second},
		{"taken away", []update{{1, 200}, {10, 0}}, 14, 4 * time.Second},
		{"taken away for a while", []update{{1, 200}, {10, 0}, {12, 0}, {15, 200}}, 100, 5 * time.Second},
		{"the longer of two", []update{{1, 200}, {10, 0}, {15, 200}, {20, 0}, {22, 200}}, 100, 5 * time.Second},
	} {
		var v validity
		for _, u := range c.updates {
			until := time.Time{}
			if u.until != 0 {
				until = at(u.until)
			}
			v.update(at(u.now), until)
		}
		if got := v.gap(at(c.now)); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}

// An SVID is not valid without its authority in the bundle.
func TestExamine(t *testing.T) {
	t.Parallel()
	d, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: trustDomain, Storage: new(memory.Keysets)})
	if err != nil {
		t.Fatal(err)
	}
	other, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: trustDomain, Storage: new(memory.Keysets)})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := d.SignX509(spiffeid.RequireFromPath(trustDomain, "/workload/1"), key.Public(), 0)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(signed.DER)
	if err != nil {
		t.Fatal(err)
	}
	svid := &x509svid.SVID{ID: signed.ID, Certificates: []*x509.Certificate{leaf}}
	for _, c := range []struct {
		what  string
		trust *keyset.Deployment
		now   time.Time
		valid bool
	}{
		{"valid", d, time.Now(), true},
		{"its key is not in the bundle", other, time.Now(), false},
		{"expired", d, leaf.NotAfter.Add(time.Second), false},
	} {
		trust := x509bundle.FromX509Authorities(trustDomain, c.trust.Bundle().Certificates())
		authority, until := examine(svid, trust, c.now)
		if authority != d.Active().X509AuthorityID || until.Equal(leaf.NotAfter) != c.valid || until.IsZero() == c.valid {
			t.Errorf("%s: authority %s, valid until %v", c.what, authority, until)
		}
	}
}

func TestPeakPerSecond(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	var paced []renewal
	for i := range 100 {
		paced = append(paced, renewal{at: begin.Add(time.Duration(i) * 50 * time.Millisecond)})
	}
	burst := slices.Clone(paced)
	for i := 40; i < 45; i++ {
		burst[i].at = burst[44].at // delayed, then together
	}
	for _, c := range []struct {
		renewals []renewal
		want     int
	}{{nil, 0}, {paced[:1], 1}, {paced, 20}, {burst, 24}} {
		if got := peakPerSecond(c.renewals); got != c.want {
			t.Errorf("most of %d: %d, want %d", len(c.renewals), got, c.want)
		}
	}
}
