// Package admin answers the operator of a node at the agent's admin socket: HTTP with JSON
// over a Unix socket. GET /attest?pid=PID attests a process and returns an [Attestation].
//
// Only root and the agent's own user are answered, and only from the agent's PID namespace:
// the root user of a container that has the socket's folder mounted could otherwise read the
// selectors of every process, among them variables of other containers.
package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/listen"
)

// maxNear is how many near misses an [Attestation] has.
const maxNear = 20

// attestTimeout is how long an attestation may take: a large program takes seconds to hash.
const attestTimeout = time.Minute

// The outcomes of an [Attestation]: what the Workload API answers to the process.
const (
	Matched     = "matched"     // with the identities of Entries
	Denied      = "denied"      // PermissionDenied: no entry matches
	Unavailable = "unavailable" // an attestor failed, and an entry could match
	Starting    = "starting"    // Unavailable: the entries are not known yet
)

// Attestation is what the agent finds out about a process.
type Attestation struct {
	PID       int       `json:"pid"`
	UID       uint32    `json:"uid"`
	GID       uint32    `json:"gid"`
	Path      string    `json:"path"` // of its program; empty if that cannot be read
	Attestors []Finding `json:"attestors"`
	Outcome   string    `json:"outcome"`
	Entries   []Entry   `json:"entries"` // that match, by ID
	// NearMisses lack exactly one selector: those with the most other selectors first,
	// and at most 20. MoreNearMisses is the number of the others.
	NearMisses     []NearMiss `json:"near_misses"`
	MoreNearMisses int        `json:"more_near_misses,omitempty"`
}

// Finding is the result of one attestor.
type Finding struct {
	Name         string   `json:"name"`
	Milliseconds float64  `json:"milliseconds"`
	Selectors    []string `json:"selectors"`
	Error        string   `json:"error,omitempty"`
}

// Entry is a registration entry.
type Entry struct {
	ID       string `json:"entry_id"`
	SPIFFEID string `json:"spiffe_id"`
	Hint     string `json:"hint,omitempty"`
}

// NearMiss is an entry with the one selector that the process lacks.
type NearMiss struct {
	Entry
	Lacks string `json:"lacks"`
}

// Config is what a [Server] needs. All fields are required.
type Config struct {
	Attestors []attest.Attestor
	Cache     *cache.Cache
	Log       *slog.Logger
}

// Server serves the admin socket. Make it with [New].
type Server struct{ cfg Config }

// New returns a server.
func New(cfg Config) *Server { return &Server{cfg} }

// Serve serves on lis, which it closes, until ctx ends. It fails if lis does.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /attest", s.attest)
	srv := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      attestTimeout + 10*time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    4 << 10,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, caller{s.refuse(conn)})
		},
	}
	return listen.ServeHTTP(ctx, listen.NewPool(), lis, srv, srv.Serve)
}

// callerKey is the key of the caller in the context of a request.
type callerKey struct{}

// caller is the process that opened a connection, and why its requests are rejected.
type caller struct{ refused error }

// refuse returns nil if the caller may use the socket.
func (s *Server) refuse(conn net.Conn) error {
	unix, ok := listen.Raw(conn).(*net.UnixConn)
	if !ok {
		return fmt.Errorf("%T is no connection of a Unix socket", conn)
	}
	p, err := attest.FromConn(unix)
	if err != nil {
		return err
	}
	defer p.Close()
	inside, err := p.InAgentsPIDNamespace()
	switch {
	case err != nil:
	case p.UID() != 0 && int(p.UID()) != os.Geteuid():
		err = fmt.Errorf("user %d may not use the admin socket: run the command as root", p.UID())
	case !inside:
		err = errors.New("the caller is in a PID namespace of its own: run the command on the node, or in the agent's container")
	}
	if err != nil {
		s.cfg.Log.Warn("caller of the admin socket rejected", "pid", p.PID(), "user", p.UID(), "error", err)
	}
	return err
}

func (s *Server) attest(w http.ResponseWriter, r *http.Request) {
	if c, known := r.Context().Value(callerKey{}).(caller); !known || c.refused != nil {
		http.Error(w, fmt.Sprint(c.refused), http.StatusForbidden)
		return
	}
	pid, err := strconv.Atoi(r.URL.Query().Get("pid"))
	if err != nil || pid <= 0 {
		http.Error(w, "the PID is not a positive number", http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), attestTimeout)
	defer cancel()
	result, err := s.Attest(ctx, pid)
	switch {
	case errors.Is(err, attest.ErrGone):
		http.Error(w, fmt.Sprintf("there is no process %d, or it has exited", pid), http.StatusNotFound)
		return
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(result) // the client may be gone
}

// Attest attests the process with this PID and finds its entries. Its error is
// [attest.ErrGone] if there is none.
func (s *Server) Attest(ctx context.Context, pid int) (*Attestation, error) {
	p, err := attest.Running(pid)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	path := p.Executable()
	found, err := attest.Selectors(ctx, p, s.cfg.Attestors)
	if err != nil {
		return nil, err
	}
	result := &Attestation{PID: pid, UID: p.UID(), GID: p.GID(), Path: path}
	for _, f := range found {
		one := Finding{Name: f.Attestor, Milliseconds: float64(f.Took.Microseconds()) / 1000, Selectors: []string{}}
		for _, selector := range f.Selectors {
			one.Selectors = append(one.Selectors, selector.String())
		}
		if f.Err != nil {
			one.Error = f.Err.Error()
		}
		result.Attestors = append(result.Attestors, one)
	}
	s.match(result, found.Selectors(), found.Missing())
	return result, nil
}

// match sets the outcome and the entries.
func (s *Server) match(result *Attestation, selectors []cache.Selector, missing []string) {
	result.Entries, result.NearMisses = []Entry{}, []NearMiss{}
	others := make(map[string]int) // by entry ID: how many selectors a near miss has beside the one
	for id, e := range s.cfg.Cache.Entries() {
		lacks := slices.DeleteFunc(slices.Clone(e.Selectors), func(s cache.Selector) bool { return slices.Contains(selectors, s) })
		entry := Entry{ID: id, SPIFFEID: e.SPIFFEID.String(), Hint: e.Hint}
		switch len(lacks) {
		case 0:
			result.Entries = append(result.Entries, entry)
		case 1:
			result.NearMisses = append(result.NearMisses, NearMiss{entry, lacks[0].String()})
			others[id] = len(e.Selectors) - 1
		}
	}
	slices.SortFunc(result.Entries, func(a, b Entry) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(result.NearMisses, func(a, b NearMiss) int {
		return cmp.Or(-cmp.Compare(others[a.ID], others[b.ID]), cmp.Compare(a.ID, b.ID))
	})
	shown := min(len(result.NearMisses), maxNear)
	result.NearMisses, result.MoreNearMisses = result.NearMisses[:shown], len(result.NearMisses)-shown
	switch view := s.cfg.Cache.Match(selectors); {
	case !view.Ready:
		result.Outcome = Starting
	case view.Matched > 0:
		result.Outcome = Matched
	case s.cfg.Cache.MayMatch(selectors, missing, func(*cache.Entry) bool { return true }):
		result.Outcome = Unavailable
	default:
		result.Outcome = Denied
	}
}
