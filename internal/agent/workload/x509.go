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

// maxClientMessage is what gRPC clients accept in one message unless told
// otherwise.
const maxClientMessage = 4 << 20

// apiDesc is the generated description of the service with a handler of our
// own for FetchX509SVID, the one call that every workload keeps open.
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
// caller with the trust bundles that go with them (SPIFFE Workload API,
// section 5.2.1).
//
// The goroutine that gRPC gives to the call lives as long as the stream, and
// with it the stack that its deepest call needed. So it only waits: what needs
// stack, even reading the request, is done aside. That makes a stream at rest
// a tenth smaller.
func (s *service) streamX509SVIDs(stream grpc.ServerStream) error {
	x := &x509Stream{s: s, stream: stream}
	// Most callers get their answer in the first look. Together with open it needs
	// one goroutine, whose stack grows once.
	var first outcome
	err := aside(func() (err error) {
		if err = x.open(); err == nil {
			first, err = x.look()
		}
		return err
	})
	defer x.close()
	if err != nil {
		return err
	}
	return s.follow(stream.Context(), x.caller, first, x.sub.C(), func() (o outcome, err error) {
		err = aside(func() error { o, err = x.look(); return err })
		return o, err
	})
}

// aside runs f on a goroutine of its own and waits for it.
func aside(f func() error) (err error) {
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
	s       *service
	stream  grpc.ServerStream
	caller  *caller
	process cache.Process
	conn    *peerConn
	sub     *cache.Subscription
	last    x509Answer    // what was sent
	sending *delivery     // of last, until it was read; nil then
	pause   time.Duration // before it is looked at next
	warned  bool          // of its size
	opened  time.Time     // when the caller was let in
	// partial is since when there is something to tell and more is to come.
	partial time.Time
	// orphaned is since when what is held does not go with the bundle.
	orphaned time.Time
}

// readLimit is the longest pause before it is looked whether an answer has been read.
// The first is PushSpacing; most have been by then.
const readLimit = 4 * time.Second

// startGrace is how long a caller is kept waiting by an agent that is starting
// before it is told to come again. Most starts take less, and a stock client
// that is sent away comes back after a second or more.
const startGrace = 500 * time.Millisecond

// orphanGrace is how long an answer waits for the replacement of SVIDs whose
// authority was removed from the bundle. Together with the new bundle they
// would be an identity that nobody accepts; the replacement is usually there
// in a moment, and then SVIDs and bundle change in one answer. After the grace
// the bundle must be told in any case: the removal may be about a stolen key.
const orphanGrace = 5 * time.Second

// partialGrace is how long a first answer waits for the other SVIDs that the
// caller is to get. Some of them may not be had for long, and to have none is
// worse than to have not all.
const partialGrace = 5 * time.Second

// bundleGrace is how long a first answer waits for federated bundles that the
// server is being asked for. It may be the only one that the workload reads.
const bundleGrace = 2 * time.Second

// open lets the caller in; close has to follow. The call counts in the cache before
// its caller is attested, which may take long.
func (x *x509Stream) open() error {
	var req workloadpb.X509SVIDRequest // has no fields
	if err := x.stream.RecvMsg(&req); err != nil {
		return err
	}
	info, ok := infoFrom(x.stream.Context())
	if !ok {
		return errAttest
	}
	x.conn, x.process = info.conn, info.peer.Process()
	x.sub = x.s.cfg.Cache.Subscribe(x.process, nil)
	c, err := x.s.enter(x.stream.Context())
	if err != nil {
		return err
	}
	x.caller, x.opened = c, time.Now()
	x.s.obs.StreamOpened(fetchX509SVID)
	x.sub.Select(c.selectors)
	<-x.sub.C() // look follows
	return nil
}

func (x *x509Stream) close() {
	// A client that asks once is gone as soon as it has its answer.
	if x.sending != nil {
		if x.conn.readAtEnd(x.sending) {
			x.sub.Read()
		}
		x.conn.forget(x.sending)
	}
	if x.sub != nil {
		x.sub.Close()
	}
	if x.caller != nil {
		x.s.obs.StreamClosed(fetchX509SVID)
		x.caller.leave()
	}
}

// reattest goes on with the selectors that the caller has by now.
func (x *x509Stream) reattest() error {
	changed, err := x.s.reattest(x.stream.Context(), x.caller)
	if err == nil && changed {
		x.sub.Select(x.caller.selectors)
	}
	return err
}

// read reports whether the client has read all that was sent.
func (x *x509Stream) read() bool {
	if x.sending == nil {
		return true
	}
	if !x.conn.read(x.sending) {
		return false
	}
	x.conn.forget(x.sending)
	x.sending = nil
	x.sub.Read()
	return true
}

// look sends what the caller is to know now, if it differs from what was sent.
func (x *x509Stream) look() (outcome, error) {
	if err := x.reattest(); err != nil {
		return outcome{}, err
	}
	v := x.sub.View()
	if left := startGrace - time.Since(x.opened); !v.Ready && left > 0 {
		return outcome{again: left}, nil
	}
	if err := x.caller.admit(&v); err != nil {
		return outcome{}, err
	}
	// One answer at a time: a client that reads none costs no more memory, and gets the
	// newest when it goes on.
	if !x.read() {
		x.pause = min(2*x.pause, readLimit)
		return outcome{again: x.pause}, nil
	}
	if len(v.Identities) == 0 {
		return outcome{}, nil
	}
	x.s.warnHidden(v.Hidden)
	// The first answer waits until it can be complete, but not for ever. A later
	// one does not: renewals must reach the workload also while an entry that was
	// just added has to wait for the server.
	if v.Waiting > 0 && x.last.identities == nil {
		if x.partial.IsZero() {
			x.partial = time.Now()
		}
		if left := partialGrace - time.Since(x.partial); left > 0 {
			return outcome{again: left}, nil
		}
	}
	if left := bundleGrace - time.Since(x.opened); v.BundlesPending && x.last.identities == nil && left > 0 {
		return outcome{again: left}, nil
	}
	if v.Orphaned == 0 {
		x.orphaned = time.Time{}
	} else {
		if x.orphaned.IsZero() {
			x.orphaned = time.Now()
		}
		if left := orphanGrace - time.Since(x.orphaned); left > 0 {
			return outcome{again: left}, nil
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
		x.s.obs.OversizeAnswer(fetchX509SVID)
		if !x.warned {
			x.warned = true
			x.s.warnOversize(x.caller, len(next.identities), size)
		}
	}
	answer := next.encode(size)
	x.s.cfg.Record(x.process, x.sub.Sending())
	x.sending, x.pause, x.last = x.conn.await(answer), PushSpacing, next
	if err := x.stream.SendMsg(encoded{answer}); err != nil {
		return outcome{}, err
	}
	return outcome{sent: true, again: x.pause}, nil
}

func (s *service) warnOversize(c *caller, identities, size int) {
	s.log.Warn("an answer is larger than gRPC clients accept by default, the workload may not be able to read it: "+
		"give it fewer registration entries, or let its client receive more "+
		"(in Go: grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(...)) in workloadapi.WithDialOptions)",
		slog.String("selectors", c.describe()), slog.Int("pid", c.peer.PID()),
		slog.Uint64("uid", uint64(c.peer.UID())), slog.String("path", c.peer.Executable()),
		slog.Int("identities", identities), slog.Int("bytes", size), slog.Int("limit", maxClientMessage))
}

// x509Answer is one answer of FetchX509SVID. It refers to what the cache
// holds, so that a stream at rest costs little more than pointers.
type x509Answer struct {
	identities []x509Identity
	own        []byte // the trust domain's bundle
	federated  []foreign
}

type x509Identity struct {
	svid *cache.SVID
	hint string
}

// foreign is the bundle of one trust domain, as DER or JWKS.
type foreign struct {
	td   spiffeid.TrustDomain
	data []byte
}

func newX509Answer(v *cache.View) x509Answer {
	a := x509Answer{
		identities: make([]x509Identity, len(v.Identities)),
		own:        v.Bundle.Own.X509DER(),
		federated:  federated(v, (*bundle.Bundle).X509DER),
	}
	for i, id := range v.Identities {
		a.identities[i] = x509Identity{id.SVID, id.Entry.Hint}
	}
	return a
}

// equal reports whether a client would be told the same. SVIDs are compared
// by pointer, because a new one is never the same; a bundle is often made anew
// with the same content.
func (a *x509Answer) equal(b *x509Answer) bool {
	return slices.Equal(a.identities, b.identities) && bytes.Equal(a.own, b.own) && equalForeign(a.federated, b.federated)
}

// federated returns the bundles of the trust domains that the matched entries
// federate with, as far as they are known, by trust domain.
func federated(v *cache.View, form func(*bundle.Bundle) []byte) []foreign {
	if len(v.Bundle.Federated) == 0 {
		return nil
	}
	var out []foreign
	for _, e := range v.Entries {
		for _, td := range e.FederatesWith {
			at, found := slices.BinarySearchFunc(out, td, func(f foreign, td spiffeid.TrustDomain) int {
				return cmp.Compare(f.td.Name(), td.Name())
			})
			if found || td == v.Bundle.Own.TrustDomain() {
				continue
			}
			if b := v.Bundle.Federated[td]; b != nil {
				out = slices.Insert(out, at, foreign{td, form(b)})
			}
		}
	}
	return out
}

func equalForeign(a, b []foreign) bool {
	return slices.EqualFunc(a, b, func(x, y foreign) bool { return x.td == y.td && bytes.Equal(x.data, y.data) })
}
