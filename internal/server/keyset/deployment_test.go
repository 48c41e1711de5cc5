package keyset_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

func ctx(t any) context.Context {
	if t, ok := t.(interface{ Context() context.Context }); ok {
		return t.Context()
	}
	return context.Background()
}

func TestOpenMakesTheFirstKeyset(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	all, err := d.List(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("List: %v, %v", all, err)
	}
	k := all[0]
	if k != d.Active() || k.State != keyset.Active {
		t.Errorf("the first keyset is %v, active is %v", k, d.Active())
	}
	if !regexp.MustCompile(`^ks_[a-z0-9]{10}$`).MatchString(k.ID) {
		t.Errorf("ID %q", k.ID)
	}
	if want := start.Truncate(time.Second); !k.IssuedAt.Equal(want) || !k.ExpiresAt.Equal(want.Add(90*24*time.Hour)) {
		t.Errorf("issued %v, expires %v", k.IssuedAt, k.ExpiresAt)
	}
	if d.Name() != "default" {
		t.Errorf("deployment %q", d.Name())
	}
	text, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	var back keyset.Keyset
	if err := json.Unmarshal(text, &back); err != nil || back != k {
		t.Errorf("read back from %s: %v, %v", text, back, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	store := new(memory.Keysets)
	open(t, keyset.Config{Storage: store})
	good, _ := store.Load(t.Context())
	broken := func(change func(*keyset.Document)) keyset.Storage {
		doc := good
		doc.Records = slices.Clone(good.Records)
		change(&doc)
		return fixed{doc}
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]keyset.Config{
		"storage fails":  {TrustDomain: td, Storage: failing{load: errors.New("disk")}},
		"nothing stored": {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records = nil })},
		"none active":    {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].State = keyset.Prepared })},
		"unknown state":  {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].State = 7 })},
		"stored twice":   {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records = append(d.Records, d.Records[0]) })},
		"broken CA":      {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].CA = []byte("x") })},
		"broken CA key":  {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].CAKey = []byte("x") })},
		"foreign CA key": {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].CAKey = d.Records[0].JWTKey })},
		"broken JWT key": {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].JWTKey = nil })},
		"CA of two":      {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].CA, d.Records[0].CAKey = caOfTwo(t) })},
		"JWT key RSA":    {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].JWTKey = pkcs8(t, rsaKey) })},
		"JWT key P-384":  {TrustDomain: td, Storage: broken(func(d *keyset.Document) { d.Records[0].JWTKey = pkcs8(t, p384) })},
		"two active": {TrustDomain: td, Storage: broken(func(d *keyset.Document) {
			other := d.Records[0]
			other.ID = "ks_other"
			d.Records = append(d.Records, other)
		})},
	} {
		if _, err := keyset.Open(t.Context(), c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func pkcs8(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// caOfTwo returns a CA certificate with the IDs of two trust domains, and its key.
func caOfTwo(t *testing.T) (cert, key []byte) {
	t.Helper()
	private := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: start.Add(time.Hour),
		URIs: []*url.URL{td.ID().URL(), spiffeid.RequireFromString("spiffe://other.org").URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	return der, pkcs8(t, private)
}

// TestEveryStepFromEveryState tries each operation on a keyset in each state.
func TestEveryStepFromEveryState(t *testing.T) {
	t.Parallel()
	const gone = keyset.State(0)
	type operation func(*keyset.Deployment, context.Context, string, ...keyset.Check) error
	operations := map[string]operation{
		"activate": (*keyset.Deployment).Activate,
		"taint":    (*keyset.Deployment).Taint,
		"remove":   (*keyset.Deployment).Remove,
	}
	type outcome struct {
		err  string // empty when the step is legal
		then keyset.State
	}
	want := map[string]map[keyset.State]outcome{
		"activate": {
			keyset.Prepared: {then: keyset.Active},
			keyset.Active:   {"cannot activate active key set", keyset.Active},
			keyset.Tainted:  {"cannot activate tainted key set", keyset.Tainted},
			gone:            {"key set not found", gone},
		},
		"taint": {
			keyset.Prepared: {then: keyset.Tainted},
			keyset.Active:   {"cannot taint active key set", keyset.Active},
			keyset.Tainted:  {"cannot taint tainted key set", keyset.Tainted},
			gone:            {"key set not found", gone},
		},
		"remove": {
			keyset.Prepared: {"cannot remove prepared key set", keyset.Prepared},
			keyset.Active:   {"cannot remove active key set", keyset.Active},
			keyset.Tainted:  {then: gone},
			gone:            {"key set not found", gone},
		},
	}
	for name, states := range want {
		for from, want := range states {
			t.Run(fmt.Sprintf("%s %v", name, from), func(t *testing.T) {
				t.Parallel()
				d := open(t, keyset.Config{})
				first := d.Active().ID
				id := "ks_unknown000"
				must := func(err error) {
					t.Helper()
					if err != nil {
						t.Fatal(err)
					}
				}
				if from != gone {
					k, err := d.Prepare(t.Context())
					must(err)
					if k.State != keyset.Prepared {
						t.Fatalf("prepared keyset is %v", k)
					}
					id = k.ID
				}
				switch from {
				case keyset.Active:
					must(d.Activate(t.Context(), id))
				case keyset.Tainted:
					must(d.Taint(t.Context(), id))
				}
				before, sequence := list(t, d), d.Bundle().Sequence

				err := operations[name](d, t.Context(), id)

				after := list(t, d)
				if got := after[id].State; got != want.then {
					t.Errorf("state is %v, want %v", got, want.then)
				}
				if want.err != "" {
					if err == nil || err.Error() != want.err {
						t.Errorf("error %v, want %q", err, want.err)
					}
					if !maps.Equal(before, after) || d.Bundle().Sequence != sequence {
						t.Errorf("a refused step changed %v to %v", before, after)
					}
					return
				}
				must(err)
				if name == "activate" && after[first].State != keyset.Prepared {
					t.Errorf("the old active keyset is %v, want PREPARED", after[first].State)
				}
				// Activation does not change the bundle.
				if changed := d.Bundle().Sequence > sequence; changed != (name != "activate") {
					t.Errorf("sequence went from %d to %d", sequence, d.Bundle().Sequence)
				}
			})
		}
	}
}

func TestActivateExpired(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	k, err := d.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.now = k.ExpiresAt
	if err := d.Activate(t.Context(), k.ID); err == nil || err.Error() != "cannot activate expired key set" {
		t.Errorf("activate: %v", err)
	}
}

// TestBundleOfARotation checks the published bundle after each step.
func TestBundleOfARotation(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{})
	published := func(want ...bool) {
		t.Helper()
		b := d.Bundle()
		var x509, jwt []bool
		for _, a := range b.X509 {
			x509 = append(x509, a.Tainted)
		}
		for _, a := range b.JWT {
			jwt = append(jwt, a.Tainted)
		}
		if !slices.Equal(x509, want) || !slices.Equal(jwt, want) {
			t.Fatalf("taint marks are %v and %v, want %v", x509, jwt, want)
		}
	}
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	old := d.Active()
	published(false)
	next, err := d.Prepare(t.Context())
	step(err)
	published(false, false)
	step(d.Activate(t.Context(), next.ID))
	published(false, false)
	step(d.Taint(t.Context(), old.ID))
	published(true, false)
	step(d.Remove(t.Context(), old.ID))
	published(false)
	b := d.Bundle()
	if b.X509[0].ID != next.X509AuthorityID || b.JWT[0].KeyID != next.JWTKeyID || !b.JWT[0].ExpiresAt.Equal(next.ExpiresAt) {
		t.Errorf("published %v, want the keys of %v", b, next)
	}
	if old.X509AuthorityID == next.X509AuthorityID || old.JWTKeyID == next.JWTKeyID {
		t.Error("two keysets share a key")
	}
}

// TestHistories carries out random operations on known and unknown keysets, and checks
// the invariants after each step.
func TestHistories(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		d := open(t, keyset.Config{})
		model := map[string]keyset.State{d.Active().ID: keyset.Active}
		known := []string{d.Active().ID, "ks_unknown000"}
		sequence := d.Bundle().Sequence
		pick := func() string { return rapid.SampledFrom(known).Draw(t, "id") }
		background := context.Background()
		t.Repeat(map[string]func(*rapid.T){
			"prepare": func(t *rapid.T) {
				k, err := d.Prepare(background)
				if err != nil {
					t.Fatal(err)
				}
				model[k.ID] = keyset.Prepared
				known = append(known, k.ID)
			},
			"activate": func(t *rapid.T) {
				id := pick()
				legal := model[id] == keyset.Prepared
				if err := d.Activate(background, id); (err == nil) != legal {
					t.Fatalf("activate %v: %v", model[id], err)
				}
				if legal {
					for other, state := range model {
						if state == keyset.Active {
							model[other] = keyset.Prepared
						}
					}
					model[id] = keyset.Active
				}
			},
			"taint": func(t *rapid.T) {
				id := pick()
				legal := model[id] == keyset.Prepared
				if err := d.Taint(background, id); (err == nil) != legal {
					t.Fatalf("taint %v: %v", model[id], err)
				}
				if legal {
					model[id] = keyset.Tainted
				}
			},
			"remove": func(t *rapid.T) {
				id := pick()
				legal := model[id] == keyset.Tainted
				if err := d.Remove(background, id); (err == nil) != legal {
					t.Fatalf("remove %v: %v", model[id], err)
				}
				if legal {
					delete(model, id)
				}
			},
			"": func(t *rapid.T) {
				got := make(map[string]keyset.State)
				var active []keyset.Keyset
				for id, k := range list(t, d) {
					got[id] = k.State
					if k.State == keyset.Active {
						active = append(active, k)
					}
				}
				if !maps.Equal(got, model) {
					t.Fatalf("states are %v, want %v", got, model)
				}
				if len(active) != 1 || active[0] != d.Active() {
					t.Fatalf("%d keysets are active: %v", len(active), active)
				}
				b := d.Bundle()
				if len(b.X509) != len(model) || len(b.JWT) != len(model) || b.Sequence < sequence {
					t.Fatalf("%d keysets, but %d and %d authorities at sequence %d", len(model), len(b.X509), len(b.JWT), b.Sequence)
				}
				sequence = b.Sequence
			},
		})
	})
}

func TestStateText(t *testing.T) {
	t.Parallel()
	if got := fmt.Sprint(keyset.Prepared, keyset.Active, keyset.Tainted, keyset.State(9)); got != "PREPARED ACTIVE TAINTED State(9)" {
		t.Error(got)
	}
	var s keyset.State
	if err := s.UnmarshalText([]byte("Active")); err == nil {
		t.Error("parsed an invalid state")
	}
	if _, err := keyset.State(0).MarshalText(); err == nil {
		t.Error("encoded an invalid state")
	}
}

func TestOpenChecksTheTrustDomain(t *testing.T) {
	t.Parallel()
	store := new(memory.Keysets)
	open(t, keyset.Config{Storage: store})
	foreign := spiffeid.RequireTrustDomainFromString("other.org")
	if _, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: foreign, Storage: store}); err == nil {
		t.Error("opened the keysets of another trust domain")
	}
}
