package config

// Nearest returns the known word that a word probably is, by the edit distance; "" if none is
// near.
func Nearest(word string, known []string) string {
	best, least := "", min(4, (len(word)+1)/2+1)
	for _, k := range known {
		if d := distance(word, k); d < least {
			best, least = k, d
		}
	}
	return best
}
