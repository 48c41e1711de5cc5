package prom

import (
	"context"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"time"

	"github.com/prometheus/common/model"
)

// gapStep is how far apart the moments are at which the history is searched for
// gaps. It is Prometheus' lookback: a moment has what was scraped since the one
// before, and a gap of ten minutes cannot be missed.
const gapStep = 5 * time.Minute

// jwt fills in what is known of the JWT-SVIDs of the key. An agent exports until
// when those last that it has handed out, but forgets it when it is started again.
// So all of them have ended in one of two cases only:
//
//   - An agent has seen the key tainted, and that is as long ago as a JWT-SVID lives. A
//     server stops signing with a key before it taints it.
//   - Those that agents have told of have ended, and no agent has forgotten any:
//     each process of the last JWTLife runs now and ran at its beginning.
func (c *Client) jwt(ctx context.Context, f *Figures, keyID string) error {
	if keyID == "" {
		return nil
	}
	life, begin := c.cfg.JWTLife.Milliseconds(), f.At.Add(-c.cfg.JWTLife)
	job, key := label(c.cfg.Job), label(exported(keyID))

	told, err := c.vector(ctx, f.At, `max(max_over_time(%s{job=%s,key_id=%s}[%dms]))`, seriesJWT, job, key, life)
	if err != nil {
		return err
	}
	if len(told) > 0 {
		// Up to the next second: an expiry must not be rounded into the past.
		f.JWTExpiry = time.Unix(int64(math.Ceil(float64(told[0].Value))), 0)
	}
	// Any moment before is as good: Prometheus may have been down at this one.
	tainted, err := c.vector(ctx, begin, `count(last_over_time(%s{job=%s,svid_type="jwt",authority=%s,state="tainted"}[%dms]))`, seriesHeld, job, key, life)
	if err != nil {
		return err
	}
	if len(tainted) > 0 {
		f.JWTSafe = true
		return nil
	}
	if f.JWTExpiry.After(f.At) {
		return nil
	}
	f.JWTSafe, err = c.remembers(ctx, f, begin)
	return err
}

// remembers reports whether no agent can have forgotten a JWT-SVID that it has
// handed out since begin. A time without scrapes hides nothing of a process that
// was seen before and after it. But an agent may have come and gone meanwhile.
func (c *Client) remembers(ctx context.Context, f *Figures, begin time.Time) (bool, error) {
	running := make(map[string]bool)
	for _, a := range f.Agents {
		if a.Process == "" || a.Duplicated {
			return false, nil
		}
		running[a.Process] = true
	}
	if f.Missing > 0 {
		return false, nil
	}
	job, life := label(c.cfg.Job), c.cfg.JWTLife.Milliseconds()
	scraped, err := c.vector(ctx, f.At, `count_over_time(count(%s{job=%s})[%dms:%dms])`, seriesUp, job, life, gapStep.Milliseconds())
	if err != nil {
		return false, err
	}
	var moments int64
	if len(scraped) > 0 {
		moments = int64(scraped[0].Value)
	}
	// They are multiples of the step since 1970.
	if step := gapStep.Milliseconds(); moments < f.At.UnixMilli()/step-begin.UnixMilli()/step {
		return false, nil
	}
	mine := ""
	if c.cfg.TrustDomain != "" {
		mine = fmt.Sprintf(",%s=~%s", labelID, strconv.Quote("spiffe://"+regexp.QuoteMeta(c.cfg.TrustDomain)+"/.*"))
	}
	query := fmt.Sprintf(`group by (%s) (last_over_time(%s{job=%s%s}[%dms]))`, labelProcess, seriesAgent, job, mine, life)
	since, err := c.vector(ctx, f.At, "%s", query)
	if err != nil {
		return false, err
	}
	for _, s := range since {
		if !running[string(s.Metric[labelProcess])] {
			return false, nil
		}
	}
	before, err := c.vector(ctx, begin, "%s", query)
	if err != nil {
		return false, err
	}
	for _, s := range before {
		delete(running, string(s.Metric[labelProcess]))
	}
	return len(running) == 0, nil
}

// vector asks about the JWT-SVIDs as of a moment.
func (c *Client) vector(ctx context.Context, at time.Time, query string, args ...any) (model.Vector, error) {
	v, _, _, err := c.api.Query(ctx, fmt.Sprintf(query, args...), at)
	if err != nil {
		return nil, fmt.Errorf("query the JWT-SVIDs: %w", err)
	}
	vector, ok := v.(model.Vector)
	if !ok {
		return nil, errors.New("query the JWT-SVIDs: the answer is no vector")
	}
	return vector, nil
}
