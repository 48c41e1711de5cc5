package workload

import (
	"bytes"
	"cmp"
	"log/slog"
	"slices"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// maxClientMessage is the largest message that gRPC clients accept by default.
const maxClientMessage = 4 << 20

// apiDesc is the generated description of the service with another handler for
// FetchX509SVID, the call that every workload keeps open.
var apiDesc = func() grpc.ServiceDesc {
	d := workloadpb.SpiffeWorkloadAPI_ServiceDesc
	d.Streams = slices.Clone(d.Streams)
	for i := range d.Streams {
		if d.Streams[i].StreamName == fetchX509SVID {
			d.Streams[i].Handler = func(srv any, stream grpc.ServerStream) error {
				return srv.(*service).streamX509SVIDs(stream)
			}
		}
	}
	return d
}()

const fetchX509SVID = "FetchX509SVID"

// streamX509SVIDs answers FetchX509SVID: it streams all X.509-SVIDs of the
// caller with their trust bundles (SPIFFE Workload API, section 5.2.1).
//
// The goroutine of the call lives as long as the stream, and with it the stack that
// its deepest call needed. So it only waits: all that needs stack, even reading the
// request, runs on another goroutine. That makes an idle stream a tenth smaller.
func (s *service) streamX509SVIDs(stream grpc.ServerStream) error {
	x := &x509Stream{s: s, stream: stream}
	// Most callers get their answer in the first update. It shares a goroutine with
	// open, whose stack then grows once.
	var first outcome
	err := onOtherGoroutine(func() (err error) {
		if err = x.open(); err == nil {
			first, err = x.update()
		}
		return err
	})
	defer x.close()
	if err != nil {
		return err
	}
	return s.follow(stream.Context(), x.caller, first, x.sub.C(), func() (o outcome, err error) {
		err = onOtherGoroutine(func() error { o, err = x.update(); return err })
		return o, err
	})
}

// onOtherGoroutine runs f on a new goroutine and waits for it.
func onOtherGoroutine(f func() error) (err error) {
	done := make(chan struct{})
	go func() {
		err = f()
		close(done)
	}()
	<-done
	return err
}

// x509Stream is one open call of FetchX509SVID.
type x509Stream struct {
	s             *service
	stream        grpc.ServerStream
	caller        *caller
	process       cache.Process
	conn          *peerConn
	sub           *cache.Subscription
	last          x509Answer
	sending       *delivery     // of last; nil once it was read
	readPause     time.Duration // until the next check of sending
	openedAt      time.Time     // when the caller was attested
	partialSince  time.Time     // a first answer waits for the other SVIDs since then
	orphanedSince time.Time     // the authority of an SVID is not in the bundle since then
}

// maxReadPause is the longest pause between two checks whether the client has read
// an answer. The first is PushSpacing: most answers are read by then.
const maxReadPause = 4 * time.Second

// startGrace is how long a call waits for an agent that is starting before it ends
// with Unavailable. Most starts take less, and common clients retry after a second
// or more.
const startGrace = 500 * time.Millisecond

// orphanGrace is how long an answer waits for the replacement of SVIDs whose
// authority was removed from the bundle. With the new bundle they would be an
// identity that no peer accepts. The replacement usually arrives soon, and then SVIDs
// and bundle change in one answer. After the grace the bundle is sent in any case:
// it may have been changed because of a stolen key.
const orphanGrace = 5 * time.Second

// partialGrace is how long a first answer waits for the caller's other SVIDs. Some
// may be unavailable for long, and a part is better than none.
const partialGrace = 5 * time.Second

// bundleGrace is how long a first answer waits for federated bundles that are being
// fetched. It may be the only answer that the workload reads.
const bundleGrace = 2 * time.Second

// open attests the caller; close has to follow. The call counts in the cache before
// the attestation, which may take long.
func (x *x509Stream) open() error {
	var req workloadpb.X509SVIDRequest // has no fields
	if err := x.stream.RecvMsg(&req); err != nil {
		return err
	}
	info, ok := peerOf(x.stream.Context())
	if !ok {
		return errAttest
	}
	x.conn, x.process = info.conn, info.peer.Process()
	x.sub = x.s.cfg.Cache.Subscribe(x.process, nil)
	c, err := x.s.admitCall(x.stream.Context())
	if err != nil {
		return err
	}
	x.caller, x.openedAt = c, time.Now()
	x.s.cfg.Observer.StreamOpened(fetchX509SVID)
	x.sub.Select(c.selectors)
	<-x.sub.C() // the first update follows in any case
	return nil
}

func (x *x509Stream) close() {
	// A client that asks once closes the stream as soon as it has its answer.
	if x.sending != nil {
		if x.conn.wasReadAtEnd(x.sending) {
			x.sub.Read()
		}
		x.conn.untrack(x.sending)
	}
	if x.sub != nil {
		x.sub.Close()
	}
	if x.caller != nil {
		x.s.cfg.Observer.StreamClosed(fetchX509SVID)
		x.caller.release()
	}
}

// reattest attests the caller again if necessary and applies changed selectors.
func (x *x509Stream) reattest() error {
	changed, err := x.s.reattest(x.stream.Context(), x.caller)
	if err == nil && changed {
		x.sub.Select(x.caller.selectors)
	}
	return err
}

// lastWasRead reports whether the client has read the last answer.
func (x *x509Stream) lastWasRead() bool {
	if x.sending == nil {
		return true
	}
	if !x.conn.wasRead(x.sending) {
		return false
	}
	x.conn.untrack(x.sending)
	x.sending = nil
	x.sub.Read()
	return true
}

// update sends an answer if it is due and differs from the last one.
func (x *x509Stream) update() (outcome, error) {
	if err := x.reattest(); err != nil {
		return outcome{}, err
	}
	v := x.sub.View()
	if left := startGrace - time.Since(x.openedAt); !v.Ready && left > 0 {
		return outcome{after: left}, nil
	}
	if err := x.caller.authorize(&v); err != nil {
		return outcome{}, err
	}
	// One answer at a time: a client that does not read costs no more memory, and gets
	// the newest answer when it continues.
	if !x.lastWasRead() {
		x.readPause = min(2*x.readPause, maxReadPause)
		return outcome{after: x.readPause}, nil
	}
	if len(v.Identities) == 0 {
		return outcome{}, nil
	}
	x.s.logHidden(v.Hidden)
	// Only the first answer waits until it is complete: renewals must reach the
	// workload also while a new entry waits for the server.
	if v.Waiting > 0 && x.last.identities == nil {
		if x.partialSince.IsZero() {
			x.partialSince = time.Now()
		}
		if left := partialGrace - time.Since(x.partialSince); left > 0 {
			return outcome{after: left}, nil
		}
	}
	if left := bundleGrace - time.Since(x.openedAt); v.BundlesPending && x.last.identities == nil && left > 0 {
		return outcome{after: left}, nil
	}
	if v.Orphaned == 0 {
		x.orphanedSince = time.Time{}
	} else {
		if x.orphanedSince.IsZero() {
			x.orphanedSince = time.Now()
		}
		if left := orphanGrace - time.Since(x.orphanedSince); left > 0 {
			return outcome{after: left}, nil
		}
	}
	next := newX509Answer(&v)
	if next.equal(&x.last) {
		return outcome{}, nil
	}
	if x.caller.peer.Alive() != nil {
		return outcome{}, errGone
	}
	size := next.size()
	if size > maxClientMessage {
		x.s.cfg.Observer.OversizeAnswer(fetchX509SVID)
		x.s.logOversize(x.caller, len(next.identities), size)
	}
	answer := next.encode(size)
	x.s.cfg.Record(x.process, x.sub.Sending())
	x.sending, x.readPause, x.last = x.conn.track(answer), PushSpacing, next
	if err := x.stream.SendMsg(encodedMessage{answer}); err != nil {
		return outcome{}, err
	}
	return outcome{sent: true, after: x.readPause}, nil
}

func (s *service) logOversize(c *caller, identities, size int) {
	s.note(slog.LevelWarn, "answer larger than gRPC clients accept by default: reduce the workload's entries or raise its client's limit "+
		"(in Go: grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(...)) in workloadapi.WithDialOptions)", c.describe(), c.peer,
		append(c.loggable(), "svids", identities, "bytes", size, "limit", maxClientMessage)...)
}

// x509Answer is one answer of FetchX509SVID. It shares its data with the cache, so
// that an idle stream costs little more than pointers.
type x509Answer struct {
	identities []x509Identity
	own        []byte // the trust domain's bundle
	federated  []encodedBundle
}

type x509Identity struct {
	svid *cache.SVID
	hint string
}

// encodedBundle is the bundle of one trust domain, as DER or JWKS.
type encodedBundle struct {
	td   spiffeid.TrustDomain
	data []byte
}

func newX509Answer(v *cache.View) x509Answer {
	a := x509Answer{
		identities: make([]x509Identity, len(v.Identities)),
		own:        v.Bundle.Own.X509DER(),
		federated:  federatedBundles(v, (*bundle.Bundle).X509DER),
	}
	for i, id := range v.Identities {
		a.identities[i] = x509Identity{id.SVID, id.Entry.Hint}
	}
	return a
}

// equal reports whether both answers are the same on the wire. SVIDs are compared by
// pointer, because a new one always differs. A new bundle often has the same content.
func (a *x509Answer) equal(b *x509Answer) bool {
	return slices.Equal(a.identities, b.identities) && bytes.Equal(a.own, b.own) && equalBundles(a.federated, b.federated)
}

// federatedBundles returns the known bundles of the trust domains that the matched
// entries federate with, in the order of their names.
func federatedBundles(v *cache.View, form func(*bundle.Bundle) []byte) []encodedBundle {
	if len(v.Bundle.Federated) == 0 {
		return nil
	}
	var out []encodedBundle
	for _, e := range v.Entries {
		for _, td := range e.FederatesWith {
			at, found := slices.BinarySearchFunc(out, td, func(f encodedBundle, td spiffeid.TrustDomain) int {
				return cmp.Compare(f.td.Name(), td.Name())
			})
			if found || td == v.Bundle.Own.TrustDomain() {
				continue
			}
			if b := v.Bundle.Federated[td]; b != nil {
				out = slices.Insert(out, at, encodedBundle{td, form(b)})
			}
		}
	}
	return out
}

func equalBundles(a, b []encodedBundle) bool {
	return slices.EqualFunc(a, b, func(x, y encodedBundle) bool { return x.td == y.td && bytes.Equal(x.data, y.data) })
}
