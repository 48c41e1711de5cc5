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

// workloadArg runs the command as a workload of a running demo. It reads commands from
// standard input and writes its state to standard output, as JSON lines. It ends with its
// input, so that it never outlives the demo.
const workloadArg = "workload"

// command is a command to a workload: one field is set.
type command struct {
	Socket string   `json:"socket,omitempty"` // connect to the Workload API here
	Peers  []remote `json:"peers,omitempty"`  // call these until Stop
	Stop   bool     `json:"stop,omitempty"`   // finish the call in flight and end
}

// remote is a workload to call.
type remote struct{ ID, Address string }

// workloadState is the whole state of a workload at one moment.
type workloadState struct {
	ID      string // SPIFFE ID
	Address string // where it serves calls

	Authority  string        // ID of the authority of its SVID, in hex
	Trusts     []string      // IDs of the authorities in its trust bundles
	LongestGap time.Duration // without a valid SVID

	Calls, Failures int
	FirstFailure    string
	Stopped         bool

	JWTKey      string // ID of the key of its last JWT-SVID
	JWTChanges  int    // how often it received another JWT-SVID
	JWTFailures int
}

// workload runs in the workload's process.
type workload struct {
	wg     sync.WaitGroup
	client *workloadapi.Client
	source *workloadapi.X509Source

	wake chan struct{} // the state has changed and is to be reported at once

	mu       sync.Mutex
	state    workloadState
	validity validity
	token    string
}

// reportInterval is the time between two reports of the counters.
const reportInterval = 100 * time.Millisecond

// runWorkload runs a workload until in ends.
func runWorkload(ctx context.Context, in io.Reader, out io.Writer) error {
	// The terminal sends signals to every process of its group. The demo handles them and
	// closes in.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &workload{wake: make(chan struct{}, 1)}
	defer w.close()
	defer cancel()
	w.wg.Go(func() { w.report(ctx, json.NewEncoder(out)) })

	calls, stopCalls := context.WithCancel(ctx)
	defer stopCalls()
	for commands := json.NewDecoder(in); ; {
		var c command
		switch err := commands.Decode(&c); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read a command: %w", err)
		}
		switch {
		case c.Socket != "":
			if err := w.connect(ctx, c.Socket); err != nil {
				return err
			}
		case c.Stop:
			stopCalls()
		default:
			w.wg.Go(func() { w.callAll(calls, c.Peers) })
		}
	}
}

// close waits for all goroutines. The context must be done.
func (w *workload) close() {
	w.wg.Wait()
	if w.source != nil {
		w.source.Close()
	}
	if w.client != nil {
		w.client.Close()
	}
}

// connect gets the first SVID, serves calls and watches the Workload API.
func (w *workload) connect(ctx context.Context, socket string) (err error) {
	if w.client, err = workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket)); err != nil {
		return fmt.Errorf("connect to the agent: %w", err)
	}
	first, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if w.source, err = workloadapi.NewX509Source(first, workloadapi.WithClient(w.client)); err != nil {
		return fmt.Errorf("get the first SVID: %w", err)
	}
	address, err := w.serveCalls(ctx)
	if err != nil {
		return err
	}
	w.update(func(c *workloadState) { c.Address = address })
	w.wg.Go(func() { _ = w.client.WatchX509Context(ctx, w) }) // w receives the errors
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
	w.update(func(c *workloadState) {
		c.ID, c.Authority, c.Trusts = svid.ID.String(), authority, trusts
		w.validity.update(now, until)
	})
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher. Only PermissionDenied
// means that the workload has no identity (SPIFFE Workload API, 5.2.1).
func (w *workload) OnX509ContextWatchError(err error) {
	if status.Code(err) == codes.PermissionDenied {
		w.update(func(*workloadState) { w.validity.update(time.Now(), time.Time{}) })
	}
}

// examine returns the authority of an SVID and its expiry. The expiry is zero if the SVID is
// not valid with the trust bundles.
func examine(svid *x509svid.SVID, trust x509bundle.Source, now time.Time) (authority string, until time.Time) {
	chain := svid.Certificates
	authority = hex.EncodeToString(chain[len(chain)-1].AuthorityKeyId)
	if _, _, err := x509svid.Verify(chain, trust, x509svid.WithTime(now)); err != nil {
		return authority, time.Time{}
	}
	return authority, chain[0].NotAfter
}

// fetchJWTs fetches a JWT-SVID continuously, like a workload that needs one per request.
func (w *workload) fetchJWTs(ctx context.Context) {
	for ctx.Err() == nil {
		token, err := w.fetchJWT(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			w.update(func(c *workloadState) { c.JWTFailures++; c.failed(err) })
		case token != w.token:
			w.update(func(c *workloadState) {
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

// keyID returns the key ID in the header of a valid token.
func keyID(token string) string {
	var header struct {
		KeyID string `json:"kid"`
	}
	part, _, _ := strings.Cut(token, ".")
	raw, _ := base64.RawURLEncoding.DecodeString(part)
	_ = json.Unmarshal(raw, &header)
	return header.KeyID
}

// update changes the state and wakes report.
func (w *workload) update(f func(*workloadState)) {
	w.mu.Lock()
	f(&w.state)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (c *workloadState) failed(err error) {
	if c.FirstFailure == "" {
		c.FirstFailure = err.Error()
	}
}

// report writes the state after updates, every reportInterval and at the end.
func (w *workload) report(ctx context.Context, out *json.Encoder) {
	ticker := time.NewTicker(reportInterval)
	defer ticker.Stop()
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true
		case <-w.wake:
		case <-ticker.C:
		}
		w.mu.Lock()
		c := w.state
		c.LongestGap = w.validity.gap(time.Now())
		w.mu.Unlock()
		if out.Encode(c) != nil {
			return // the demo has ended, and so will the input
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
