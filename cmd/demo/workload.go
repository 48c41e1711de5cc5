package main

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// workloadArg makes the command be one workload of a running demo. It takes
// orders on standard input and tells its state on standard output, one JSON
// value a line, and ends with its input: so it never outlives the demo.
const workloadArg = "workload"

// order is what the demo tells a workload: one field is set.
type order struct {
	Socket string   `json:"socket,omitempty"` // connect to the Workload API here
	Peers  []remote `json:"peers,omitempty"`  // call these until told to stop
	Stop   bool     `json:"stop,omitempty"`   // finish the call and make no more
}

// remote is a workload to call.
type remote struct{ ID, Address string }

// condition is all there is to know of a workload at one moment. It is told
// whenever it has changed and never as a difference to an earlier one.
type condition struct {
	ID      string // SPIFFE ID
	Address string // where it takes calls

	Authority  string        // key that signed the SVID held, by its ID in hex
	Trusts     []string      // keys trusted in others
	LongestGap time.Duration // without a valid SVID

	Calls, Failures int
	FirstFailure    string
	Stopped         bool

	JWTKey      string // key that signed the JWT-SVID last handed out
	JWTChanges  int    // how often it was another than before
	JWTFailures int
}

// workload is the state of the workload's process.
type workload struct {
	wg     sync.WaitGroup
	client *workloadapi.Client
	source *workloadapi.X509Source

	wake chan struct{} // something has changed that is worth telling at once

	mu       sync.Mutex
	now      condition
	validity validity
	token    string
}

// tellEvery is how often the counters are told.
const tellEvery = 100 * time.Millisecond

// runWorkload is the whole process. It returns when in ends.
func runWorkload(ctx context.Context, in io.Reader, out io.Writer) error {
	// Ctrl-C reaches every process of the terminal's group. The demo gets it
	// too and then closes in.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &workload{wake: make(chan struct{}, 1)}
	defer w.close()
	defer cancel()
	w.wg.Go(func() { w.tell(ctx, json.NewEncoder(out)) })

	calls, stopCalls := context.WithCancel(ctx)
	defer stopCalls()
	for orders := json.NewDecoder(in); ; {
		var o order
		switch err := orders.Decode(&o); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read an order: %w", err)
		}
		switch {
		case o.Socket != "":
			if err := w.connect(ctx, o.Socket); err != nil {
				return err
			}
		case o.Stop:
			stopCalls()
		default:
			w.wg.Go(func() { w.callAll(calls, o.Peers) })
		}
	}
}

// close waits for everything that was started; the context has ended.
func (w *workload) close() {
	w.wg.Wait()
	if w.source != nil {
		w.source.Close()
	}
	if w.client != nil {
		w.client.Close()
	}
}

// connect gets the first SVID, begins to take calls and watches from then on
// what the agent hands out.
func (w *workload) connect(ctx context.Context, socket string) (err error) {
	if w.client, err = workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket)); err != nil {
		return fmt.Errorf("connect to the agent: %w", err)
	}
	first, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if w.source, err = workloadapi.NewX509Source(first, workloadapi.WithClient(w.client)); err != nil {
		return fmt.Errorf("get the first SVID: %w", err)
	}
	address, err := w.answer(ctx)
	if err != nil {
		return err
	}
	w.change(func(c *condition) { c.Address = address })
	w.wg.Go(func() { _ = w.client.WatchX509Context(ctx, w) }) // the watcher is told of errors
	w.wg.Go(func() { w.fetchJWTs(ctx) })
	return nil
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w *workload) OnX509ContextUpdate(x *workloadapi.X509Context) {
	svid := x.DefaultSVID()
	now := time.Now()
	authority, until := examine(svid, x.Bundles, now)
	var trusts []string
	for _, b := range x.Bundles.Bundles() {
		for _, a := range b.X509Authorities() {
			trusts = append(trusts, hex.EncodeToString(a.SubjectKeyId))
		}
	}
	w.change(func(c *condition) {
		c.ID, c.Authority, c.Trusts = svid.ID.String(), authority, trusts
		w.validity.update(now, until)
	})
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher. Only
// PermissionDenied says that the workload has no identity (SPIFFE Workload
// API, 5.2.1); on any other error it keeps what it holds.
func (w *workload) OnX509ContextWatchError(err error) {
	if status.Code(err) == codes.PermissionDenied {
		w.change(func(*condition) { w.validity.update(time.Now(), time.Time{}) })
	}
}

// examine finds the key that signed an SVID and until when the SVID is valid:
// the zero time when it is not, under the trust bundles that came with it.
func examine(svid *x509svid.SVID, trust x509bundle.Source, now time.Time) (authority string, until time.Time) {
	chain := svid.Certificates
	authority = hex.EncodeToString(chain[len(chain)-1].AuthorityKeyId)
	if _, _, err := x509svid.Verify(chain, trust, x509svid.WithTime(now)); err != nil {
		return authority, time.Time{}
	}
	return authority, chain[0].NotAfter
}

// fetchJWTs asks for a JWT-SVID all the time, as a workload does that needs
// one for each request it makes.
func (w *workload) fetchJWTs(ctx context.Context) {
	for ctx.Err() == nil {
		token, err := w.fetchJWT(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			w.change(func(c *condition) { c.JWTFailures++; c.failed(err) })
		case token != w.token:
			w.change(func(c *condition) {
				if w.token != "" {
					c.JWTChanges++
				}
				w.token, c.JWTKey = token, keyID(token)
			})
		}
		pause(ctx, 250*time.Millisecond)
	}
}

func (w *workload) fetchJWT(ctx context.Context) (token string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	svid, err := w.client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "demo"})
	if err != nil {
		return "", fmt.Errorf("fetch a JWT-SVID: %w", err)
	}
	return svid.Marshal(), nil
}

// keyID reads the key ID in the header of a token that was parsed before.
func keyID(token string) string {
	var header struct {
		KeyID string `json:"kid"`
	}
	part, _, _ := strings.Cut(token, ".")
	raw, _ := base64.RawURLEncoding.DecodeString(part)
	_ = json.Unmarshal(raw, &header)
	return header.KeyID
}

// change changes the condition and has it told.
func (w *workload) change(f func(*condition)) {
	w.mu.Lock()
	f(&w.now)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (c *condition) failed(err error) {
	if c.FirstFailure == "" {
		c.FirstFailure = err.Error()
	}
}

// tell writes the condition now and then, and once more at the end.
func (w *workload) tell(ctx context.Context, out *json.Encoder) {
	ticker := time.NewTicker(tellEvery)
	defer ticker.Stop()
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true
		case <-w.wake:
		case <-ticker.C:
		}
		w.mu.Lock()
		c := w.now
		c.LongestGap = w.validity.gap(time.Now())
		w.mu.Unlock()
		if out.Encode(c) != nil {
			return // nobody listens any more; then the input ends as well
		}
	}
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
