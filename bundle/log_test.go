package bundle_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
)

// lines is a log at info level. take returns level, message and trust domain or authority
// of each line since the last call.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) logger() *slog.Logger {
	kept := []string{slog.LevelKey, slog.MessageKey, "trust_domain", "authority_id", "changes"}
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if !slices.Contains(kept, a.Key) {
			return slog.Attr{}
		}
		return a
	}}))
}

func (l *lines) take() []string {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.buf.Reset()
	return strings.Split(strings.TrimSuffix(l.buf.String(), "\n"), "\n")
}

func (l *lines) want(t *testing.T, when string, want ...string) {
	t.Helper()
	if len(want) == 0 {
		want = []string{""}
	}
	if got := l.take(); !slices.Equal(got, want) {
		t.Errorf("%s: logged\n%s\nwant\n%s", when, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Each change of the own bundle is logged once, and so are the beginning and the end of
// failures and of older answers.
func TestOwnBundleIsLoggedOnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := bundle.X509Authority{Certificate: newCA(t, "a", nil).cert}, bundle.X509Authority{Certificate: newCA(t, "b", nil).cert}
		c := bundle.X509Authority{Certificate: newCA(t, "c", nil).cert, Tainted: true}
		src, log := &source{own: newBundle(t, 7, a, c)}, &lines{}
		refreshing(t, bundle.RefresherConfig{Log: log.logger()}, src, func(*bundle.Refresher, func() []*bundle.Snapshot) {
			wait := func() { time.Sleep(30 * time.Second) }
			wait()
			log.want(t, "at first", `level=INFO msg="bundle refreshed" changes=3`, `level=INFO msg="x509 authority tainted" authority_id=63`)
			tainted := a
			tainted.Tainted = true
			src.set(newBundle(t, 8, tainted, c, b), nil)
			wait()
			log.want(t, "a change", `level=INFO msg="bundle refreshed" changes=2`,
				`level=INFO msg="x509 authority tainted" authority_id=61`, `level=INFO msg="x509 authority added" authority_id=62`)
			src.set(nil, errors.New("no answer"))
			wait()
			log.want(t, "failures", `level=WARN msg="bundle refresh failed, current one kept"`)
			src.set(newBundle(t, 8, tainted, c, b), nil)
			wait()
			log.want(t, "recovered", `level=INFO msg="bundle refresh recovered"`)
			src.set(newBundle(t, 7, a, c), nil)
			wait()
			log.want(t, "older", `level=WARN msg="older bundle received, current one kept"`)
			src.set(newBundle(t, 8, tainted, c, b), nil)
			wait()
			log.want(t, "newer again")
			src.set(newBundle(t, 7, a, c), nil)
			time.Sleep(2 * time.Minute)
			log.want(t, "older for long", `level=WARN msg="older bundle received, current one kept"`, `level=WARN msg="older bundle received for a minute, applied"`,
				`level=INFO msg="bundle refreshed" changes=2`, `level=INFO msg="x509 authority untainted" authority_id=61`, `level=INFO msg="x509 authority removed" authority_id=62`)
			odd, err := bundle.New(td, bundle.Content{Sequence: 8, X509: []bundle.X509Authority{a, c}, LeftOut: []bundle.LeftOut{{Type: bundle.TypeUnknown, Reason: "it has no use"}}})
			if err != nil {
				t.Fatal(err)
			}
			src.set(odd, nil)
			wait()
			log.want(t, "an unusable authority", `level=INFO msg="bundle refreshed" changes=0`, `level=WARN msg="unusable authorities left out of the bundle" trust_domain=example.org`)
		})
	})
}

// A federated bundle whose requests fail is a warning after a minute, once, unless those
// for the own bundle fail, too.
func TestFederatedBundlesAreLoggedOnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, all := newPartners(t, 1)
		p, without := all[0], spiffeid.RequireTrustDomainFromString("without.test")
		wanted := []spiffeid.TrustDomain{p, without}
		var want atomic.Pointer[[]spiffeid.TrustDomain]
		want.Store(&wanted)
		var failing atomic.Bool
		src.answer = func(context.Context, spiffeid.TrustDomain) error {
			if failing.Load() {
				return errors.New("no answer")
			}
			return nil
		}
		log := &lines{}
		cfg := bundle.RefresherConfig{Log: log.logger(), Federated: func() []spiffeid.TrustDomain { return *want.Load() }}
		refreshing(t, cfg, src, func(_ *bundle.Refresher, published func() []*bundle.Snapshot) {
			time.Sleep(10 * time.Second)
			log.want(t, "at first", `level=INFO msg="bundle refreshed" changes=1`, `level=INFO msg="federated bundle refreshed" trust_domain=p000.test`)

			failing.Store(true)
			time.Sleep(50 * time.Second)
			log.want(t, "not long")
			time.Sleep(5 * time.Minute)
			got := log.take()
			slices.Sort(got)
			if want := []string{`level=WARN msg="federated bundle refresh failed, current one kept" trust_domain=p000.test`, `level=WARN msg="federated bundle refresh failed, current one kept" trust_domain=without.test`}; !slices.Equal(got, want) {
				t.Errorf("for long: %v", got)
			}
			if s := last(published); s.Federated[p] == nil || !s.NotFound[without] {
				t.Errorf("after failures there are %v, not found %v", slices.Collect(maps.Keys(s.Federated)), s.NotFound)
			}
			failing.Store(false)
			time.Sleep(10 * time.Second)
			got = log.take()
			slices.Sort(got)
			if want := []string{`level=INFO msg="federated bundle refresh recovered" trust_domain=p000.test`, `level=INFO msg="federated bundle refresh recovered" trust_domain=without.test`}; !slices.Equal(got, want) {
				t.Errorf("recovered: %v", got)
			}

			// The server is away.
			own := src.own
			src.set(nil, errors.New("no answer"))
			failing.Store(true)
			time.Sleep(5 * time.Minute)
			log.want(t, "the server is away", `level=WARN msg="bundle refresh failed, current one kept"`)
			src.set(own, nil)
			failing.Store(false)
			time.Sleep(10 * time.Second)
			log.want(t, "the server is back", `level=INFO msg="bundle refresh recovered"`)

			src.setFederated(p, nil)
			time.Sleep(10 * time.Second)
			log.want(t, "not found", `level=WARN msg="federated bundle not found, current one kept" trust_domain=p000.test`)
			src.setFederated(p, foreignBundle(t, p, 2, "g"))
			time.Sleep(10 * time.Second)
			log.want(t, "found", `level=INFO msg="federated bundle refreshed" trust_domain=p000.test`)
			none := wanted[:0]
			want.Store(&none)
			time.Sleep(10 * time.Second)
			log.want(t, "no longer wanted", `level=INFO msg="federated bundle dropped" trust_domain=p000.test`)
			if s := last(published); len(s.Federated)+len(s.NotFound) > 0 {
				t.Errorf("no longer wanted, and there: %v, not found %v", s.Federated, s.NotFound)
			}
		})
	})
}
