/* A tool as NVTX's injection interface (NVTX 3) knows it: prints every range that is pushed and popped in a domain.
   Written without NVIDIA's headers, which no package of the tests brings along. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef void (*Function)(void);
typedef struct {
  size_t struct_size;
  int (*functions_of_module)(uint32_t module, Function*** table, unsigned int* size);
} Callbacks;
typedef struct {
  uint16_t version, size;
  uint32_t category, color_type, color, payload_type, reserved;
  uint64_t payload;
  int32_t message_type;
  const char* message;
} Attributes;

enum { CALLBACKS = 1, CORE2 = 5, REGISTERED = 3 };
enum { PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };

static const char* categories[16] = {"none"};

/* Handles are copies of the names. */
static const char* create_domain(const char* name) { return strdup(name); }
static const char* register_string(const char* domain, const char* string) { return strdup(string); }
static void name_category(const char* domain, uint32_t category, const char* name) {
  categories[category] = strdup(name);
}
static int push(const char* domain, const Attributes* range) {
  printf("push %s [%s] %s %s\n", domain, categories[range->category],
         range->message_type == REGISTERED ? "registered" : "unregistered", range->message);
  return 0;
}
static int pop(const char* domain) {
  printf("pop %s\n", domain);
  return 0;
}

int InitializeInjectionNvtx2(const void* (*export_table)(uint32_t)) {
  Function** table;
  unsigned int size;
  const Callbacks* callbacks = export_table(CALLBACKS);
  if (callbacks == NULL || !callbacks->functions_of_module(CORE2, &table, &size)) return 0;
  *table[PUSH] = (Function)push;
  *table[POP] = (Function)pop;
  *table[NAME_CATEGORY] = (Function)name_category;
  *table[REGISTER_STRING] = (Function)register_string;
  *table[CREATE_DOMAIN] = (Function)create_domain;
  setvbuf(stdout, NULL, _IOLBF, 0);
  return 1;
}
