/* Forks for ever; what cannot fork tries again. */
#include <unistd.h>

int main(void)
{
	for (;;)
		if (fork() < 0)
			usleep(2000);
}
