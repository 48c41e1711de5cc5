package bundle

import (
	"context"
	"errors"
	"iter"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Federated bundles are fetched on two lanes. A bundle whose last request took more than
// a second is fetched on the second lane, with a longer timeout, until it is fast again.
// So requests that hang do not delay those that are answered.
var lanes = [...]struct {
	limit   int // requests at a time
	timeout time.Duration
}{
	prompt: {16, time.Second},
	slow:   {16, 10 * time.Second},
}

// The lanes.
const (
	prompt = iota
	slow
)

// failureLimit is how long requests for a federated bundle fail before a warning is
// logged. While those for the own bundle fail, none is.
const failureLimit = time.Minute

// following is the state of one federated bundle. It is owned by Run.
type following struct {
	wanted, asking bool
	due            time.Time // of the next request; zero: at once
	lane           int
	doubt          Doubt
	failing        time.Time // since when requests fail; zero: the last one did not
	warned         bool      // the failures were logged as a warning
}

// federatedAnswer is the result of one request.
type federatedAnswer struct {
	td     spiffeid.TrustDomain
	lane   int
	took   time.Duration
	bundle *Bundle
	err    error
}

// askFederated starts requests for the federated bundles that are due, within the limits
// of the lanes. It returns when the next one is due; zero if that depends on an answer.
func (r *Refresher) askFederated(ctx context.Context, work *sync.WaitGroup) (next time.Time) {
	if r.snap == nil {
		return next
	}
	r.want(r.cfg.Federated())
	now := time.Now()
	var due []spiffeid.TrustDomain
	for td, f := range r.federated {
		switch {
		case f.asking:
		case !f.due.After(now):
			due = append(due, td)
		case next.IsZero() || f.due.Before(next):
			next = f.due
		}
	}
	// The one that has waited the longest is next.
	slices.SortFunc(due, func(a, b spiffeid.TrustDomain) int { return r.federated[a].due.Compare(r.federated[b].due) })
	for _, td := range due {
		f := r.federated[td]
		if lane := f.lane; r.busy[lane] < lanes[lane].limit {
			r.busy[lane]++
			f.asking = true
			work.Go(func() { r.answers <- r.ask(ctx, td, lane) })
		}
	}
	return next
}

func (r *Refresher) ask(ctx context.Context, td spiffeid.TrustDomain, lane int) federatedAnswer {
	ctx, cancel := context.WithTimeout(ctx, lanes[lane].timeout)
	defer cancel()
	began := time.Now()
	b, err := r.cfg.Fetcher.FetchFederatedBundle(ctx, td)
	return federatedAnswer{td, lane, time.Since(began), b, err}
}

// want sets which federated bundles are followed and drops the others.
func (r *Refresher) want(wanted []spiffeid.TrustDomain) {
	for _, f := range r.federated {
		f.wanted = false
	}
	for _, td := range wanted {
		if td == r.snap.Own.TrustDomain() {
			continue
		}
		if r.federated[td] == nil {
			r.federated[td] = new(following)
		}
		r.federated[td].wanted = true
	}
	maps.DeleteFunc(r.federated, func(_ spiffeid.TrustDomain, f *following) bool { return !f.wanted && !f.asking })
	var gone []spiffeid.TrustDomain
	for _, held := range []iter.Seq[spiffeid.TrustDomain]{maps.Keys(r.snap.Federated), maps.Keys(r.snap.NotFound)} {
		for td := range held {
			if f := r.federated[td]; f == nil || !f.wanted {
				gone = append(gone, td)
			}
		}
	}
	if len(gone) == 0 {
		return
	}
	next := r.snap.clone()
	for _, td := range gone {
		if next.Federated[td] != nil {
			r.cfg.Log.Info("federated bundle dropped", "trust_domain", td.Name())
		}
		delete(next.Federated, td)
		delete(next.NotFound, td)
	}
	r.publish(next)
}

// clone returns a copy whose maps may be changed.
func (s *Snapshot) clone() *Snapshot {
	out := &Snapshot{Own: s.Own, Federated: make(map[spiffeid.TrustDomain]*Bundle), NotFound: make(map[spiffeid.TrustDomain]bool)}
	maps.Copy(out.Federated, s.Federated)
	maps.Copy(out.NotFound, s.NotFound)
	return out
}

// refreshFederated applies an answer, and all others that have arrived meanwhile, and
// publishes at most one snapshot.
func (r *Refresher) refreshFederated(a federatedAnswer) {
	next, changed := r.snap.clone(), false
	for {
		if r.apply(next, a) {
			changed = true
		}
		select {
		case a = <-r.answers:
			continue
		default:
		}
		break
	}
	if changed {
		r.publish(next)
	}
}

// apply applies one answer to next and reports whether next has changed.
func (r *Refresher) apply(next *Snapshot, a federatedAnswer) bool {
	r.busy[a.lane]--
	f := r.federated[a.td]
	f.asking = false
	if !f.wanted {
		return false
	}
	f.due = time.Now().Add(Jitter(r.cfg.Interval))
	f.lane = prompt
	if a.took >= lanes[prompt].timeout {
		f.lane = slow
	}
	none := errors.Is(a.err, ErrNotFound)
	if a.err != nil && !none {
		if a.lane == prompt && f.lane == slow {
			f.due = time.Time{} // again at once, with the longer timeout
			return false
		}
		r.failedFederated(f, a)
		return false
	}
	if f.warned {
		r.cfg.Log.Info("federated bundle refresh recovered", "trust_domain", a.td.Name())
	}
	f.failing, f.warned = time.Time{}, false

	held := next.Federated[a.td]
	switch {
	case none && next.NotFound[a.td]:
		return false
	case none && held != nil && r.withheld(&f.doubt, "federated bundle not found", "trust_domain", a.td.Name()):
		return false
	case none:
		delete(next.Federated, a.td)
		next.NotFound[a.td] = true
		return true
	case older(held, a.bundle) && r.withheld(&f.doubt, "older federated bundle received",
		"trust_domain", a.td.Name(), "sequence", a.bundle.Sequence(), "current", held.Sequence()):
		return false
	}
	f.doubt.Clear()
	if a.bundle.Equal(held) {
		return false
	}
	delete(next.NotFound, a.td)
	next.Federated[a.td] = a.bundle.since(held, r.cfg.Now())
	r.cfg.Log.Info("federated bundle refreshed", "trust_domain", a.td.Name(), "sequence", a.bundle.Sequence(),
		"x509_authorities", len(a.bundle.X509()), "jwt_authorities", len(a.bundle.JWT()))
	r.logLeftOut(held, a.bundle)
	return true
}

// failedFederated logs a failure: as a warning, once, if one trust domain has failed for
// failureLimit. While the server does not answer at all, the own bundle's warning says so.
func (r *Refresher) failedFederated(f *following, a federatedAnswer) {
	level := r.cfg.Log.Debug
	switch {
	case f.failing.IsZero():
		f.failing = time.Now()
	case !f.warned && !r.failing && time.Since(f.failing) >= failureLimit:
		f.warned, level = true, r.cfg.Log.Warn
	}
	level("federated bundle refresh failed, current one kept", "trust_domain", a.td.Name(), "error", a.err)
}
